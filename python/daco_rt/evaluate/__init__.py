"""Evaluation: benchmarks, judges, baselines, metrics and the report. ``daco-rt evaluate`` runs it.

- :mod:`daco_rt.evaluate.benchmarks` reads benchmarks into samples;
- :mod:`daco_rt.evaluate.judges` gives verdicts on answers;
- :mod:`daco_rt.evaluate.methods` builds what is compared;
- :mod:`daco_rt.evaluate.run` runs methods × benchmarks × seeds, and
  :mod:`daco_rt.evaluate.report` writes the page.
"""
