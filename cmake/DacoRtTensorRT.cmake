# The TensorRT plugin library: compiled against TensorRT's headers, linked to nothing of TensorRT, so that one
# library serves the versions that share the IPluginV3 interfaces (10.x and 11.x).

set(DACO_RT_TENSORRT_VERSION "")
set(DACO_RT_TENSORRT_STATE "not built: DACO_RT_TENSORRT=OFF")
if(NOT DACO_RT_TENSORRT STREQUAL "OFF")
  find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h
            HINTS "${CMAKE_CURRENT_SOURCE_DIR}/build/deps/tensorrt/include" ENV TENSORRT_INCLUDE_DIR
            PATH_SUFFIXES x86_64-linux-gnu aarch64-linux-gnu
            DOC "folder of NvInferRuntime.h")
  if(NOT TENSORRT_INCLUDE_DIR)
    # find_path remembers a failure; the next configure must look again once the headers were fetched.
    unset(TENSORRT_INCLUDE_DIR CACHE)
    daco_rt_skip(TENSORRT "no headers; run cmake/fetch_tensorrt_headers.py or set TENSORRT_INCLUDE_DIR")
  elseif(NOT TARGET daco_cuda)
    daco_rt_skip(TENSORRT "it needs the CUDA kernels (CUDA ${DACO_RT_CUDA_STATE})")
  else()
    # 10.14 says NV_TENSORRT_MAJOR by way of TRT_MAJOR_ENTERPRISE, others directly.
    set(parts "")
    foreach(part MAJOR MINOR PATCH)
      file(STRINGS "${TENSORRT_INCLUDE_DIR}/NvInferVersion.h" line
           REGEX "^#define (TRT_${part}_ENTERPRISE|NV_TENSORRT_${part}) [0-9]+")
      string(REGEX MATCH " [0-9]+" number "${line}")
      string(STRIP "${number}" number)
      list(APPEND parts "${number}")
    endforeach()
    list(JOIN parts "." DACO_RT_TENSORRT_VERSION)
    if(DACO_RT_TENSORRT_VERSION VERSION_LESS 10.3)
      daco_rt_skip(TENSORRT "headers of TensorRT ${DACO_RT_TENSORRT_VERSION}, older than 10.3")
      set(DACO_RT_TENSORRT_VERSION "")
    else()
      set(DACO_RT_TENSORRT_STATE "plugin on the headers of TensorRT ${DACO_RT_TENSORRT_VERSION}")
      add_library(daco_trt_plugin MODULE csrc/adapters/tensorrt/fields.cpp
                                         csrc/adapters/tensorrt/library.cpp
                                         csrc/adapters/tensorrt/operators.cpp
                                         csrc/adapters/tensorrt/plugin.cpp
                                         csrc/adapters/tensorrt/report.cpp)
      target_include_directories(daco_trt_plugin SYSTEM PRIVATE "${TENSORRT_INCLUDE_DIR}"
                                                                ${CUDAToolkit_INCLUDE_DIRS})
      target_link_libraries(daco_trt_plugin PRIVATE daco_cuda daco_flags)
      # The static CUDA runtime inside must not answer for that of the process.
      target_link_options(daco_trt_plugin PRIVATE -Wl,-z,defs -Wl,--exclude-libs,ALL)
      install(TARGETS daco_trt_plugin LIBRARY DESTINATION daco_rt/lib)
    endif()
  endif()
endif()
