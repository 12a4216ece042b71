"""Which operators have no form in standard operators, and what is said about them."""

from __future__ import annotations

import pytest

from daco_rt.errors import UnsupportedError
from daco_rt.ops.onnx_functions import function_refusal, has_function, steer_function


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"coder": "elastic_net", "k": 4}, "elastic_net"),
        ({"coder": "omp", "k": 17}, "k = 17"),
        ({"coder": "omp", "k": 4, "sign": "nnls"}, "nnls"),
    ],
)
def test_what_has_no_function_is_refused_by_name(attributes, named):
    assert not has_function("SteerPursuit", **attributes)
    assert named in function_refusal("SteerPursuit", **attributes)
    with pytest.raises(UnsupportedError, match=f"{named}.*custom-op library is required"):
        steer_function("SteerPursuit", **attributes, k_out=1)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"coder": "omp"}, "coder"), ({"k": 0}, "k "), ({"k_out": -1}, "k_out"), ({"weight": "int3"}, "weight")],
)
def test_wrong_attributes_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        steer_function("SteerSae", **({"coder": "topk", "k": 4, "k_out": 1} | wrong))
