# daco_cuda: the kernels for NVIDIA GPUs, a static library on the static CUDA runtime, so that adapters need
# neither torch's nor the system's libcudart. daco_cuda exists only when it is built: adapters ask
# if(TARGET daco_cuda).

set(DACO_RT_CUDA_STATE "not built: DACO_RT_CUDA=OFF")
if(NOT DACO_RT_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    # A failed search is remembered; the next configure must look again.
    unset(CMAKE_CUDA_COMPILER CACHE)
    daco_rt_skip(CUDA "no nvcc found (put it on PATH or set CUDACXX)")
  else()
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
      daco_rt_skip(CUDA "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.4")
    else()
      find_package(CUDAToolkit REQUIRED)
      add_library(daco_cuda STATIC ${DACO_CUDA_SOURCES})
      set(daco_cuda_codes "")
      foreach(arch IN LISTS DACO_RT_CUDA_ARCHS)
        list(APPEND daco_cuda_codes "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
      endforeach()
      # PTX of the first generation with all that the kernels use, for GPUs newer than those named.
      list(APPEND daco_cuda_codes "SHELL:-gencode arch=compute_90,code=compute_90")
      target_compile_options(
        daco_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${daco_cuda_codes} --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra>
                          $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${DACO_RT_WERROR}>>:-Werror=all-warnings>)
      set_target_properties(
        daco_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
                             CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
      target_include_directories(daco_cuda PUBLIC csrc)
      target_link_libraries(daco_cuda PUBLIC daco_core CUDA::cudart_static ${CMAKE_DL_LIBS})
      list(JOIN DACO_RT_CUDA_ARCHS ", sm_" archs)
      set(DACO_RT_CUDA_STATE "sm_${archs} and PTX 9.0, nvcc ${CMAKE_CUDA_COMPILER_VERSION}, static runtime")
    endif()
  endif()
endif()
