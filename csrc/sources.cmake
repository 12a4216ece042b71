# Sources of the core and of the CPU kernels, and the flags that single files need.
# Relative paths are taken from this folder, which is the include root of all of them.
set(DACO_CORE_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/core/names.cpp
    ${CMAKE_CURRENT_LIST_DIR}/core/status.cpp
    ${CMAKE_CURRENT_LIST_DIR}/core/validate.cpp)

set(DACO_CPU_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/cpu/affine.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/convert.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/dictionary.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/edit.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/elastic_net.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/encode.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/gram.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/isa.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/kernels_scalar.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/launch.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/least_squares.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/plan.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/pursuit.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/select.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/small_net.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/steer.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cpu/workspace.cpp)

set(DACO_CUDA_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/cuda/affine.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/device.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/edit.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/elastic_net.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/encode_dot.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/encode_mma.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/gemm.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cuda/gram.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/layout.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cuda/omp.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/pursuit_plan.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cuda/pursuit_steer.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/sae_plan.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cuda/sae_steer.cpp
    ${CMAKE_CURRENT_LIST_DIR}/cuda/select.cu)

# The tables for newer instruction sets are picked at run time, so these flags must reach these files only.
set(DACO_CPU_AVX2_SOURCES "")
set(DACO_CPU_AVX512_SOURCES "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(DACO_CPU_AVX2_SOURCES ${CMAKE_CURRENT_LIST_DIR}/cpu/kernels_avx2.cpp)
  set(DACO_CPU_AVX512_SOURCES ${CMAKE_CURRENT_LIST_DIR}/cpu/kernels_avx512.cpp)
  set(DACO_CPU_AVX2_FLAGS -mavx2 -mfma -mf16c)
  set(DACO_CPU_AVX512_FLAGS ${DACO_CPU_AVX2_FLAGS} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC's own AVX-512 headers leave don't-care operands uninitialised.
    list(APPEND DACO_CPU_AVX512_FLAGS -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  set_source_files_properties(${DACO_CPU_AVX2_SOURCES} PROPERTIES COMPILE_OPTIONS "${DACO_CPU_AVX2_FLAGS}")
  set_source_files_properties(${DACO_CPU_AVX512_SOURCES} PROPERTIES COMPILE_OPTIONS "${DACO_CPU_AVX512_FLAGS}")
endif()
