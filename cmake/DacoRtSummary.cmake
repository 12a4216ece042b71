# What is built and why, in one table at the end of configuring.

message(STATUS "daco_rt ${PROJECT_VERSION} (${DACO_RT_COMMIT}), ${CMAKE_CXX_COMPILER_ID} "
               "${CMAKE_CXX_COMPILER_VERSION}, ${CMAKE_BUILD_TYPE}")
message(STATUS "  CPU kernels       ${DACO_RT_ISAS}")
message(STATUS "  torch             ${DACO_RT_TORCH_STATE}")
message(STATUS "  ONNX Runtime      ${DACO_RT_ONNXRUNTIME_STATE}")
message(STATUS "  numpy (_core)     ${DACO_RT_PYTHON_STATE}")
message(STATUS "  CUDA              ${DACO_RT_CUDA_STATE}")
message(STATUS "  TensorRT          ${DACO_RT_TENSORRT_STATE}")
