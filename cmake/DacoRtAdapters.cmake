# One library per framework, each built only when its headers are found. Every adapter leaves in
# DACO_RT_<NAME>_STATE what the summary prints.

find_package(Python 3.10 QUIET COMPONENTS Interpreter Development.Module)
find_package(Threads REQUIRED)

# Where an importable package lies and its version, without importing it.
function(daco_rt_python_package package path version)
  set(${path} "" PARENT_SCOPE)
  set(${version} "" PARENT_SCOPE)
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
              "import importlib.util as u, importlib.metadata as m; s = u.find_spec('${package}'); print(s.submodule_search_locations[0], m.version('${package}'), sep=';', end='')"
      OUTPUT_VARIABLE found RESULT_VARIABLE failed ERROR_QUIET)
    if(NOT failed)
      list(GET found 0 where)
      list(GET found 1 which)
      set(${path} "${where}" PARENT_SCOPE)
      set(${version} "${which}" PARENT_SCOPE)
    endif()
  endif()
endfunction()

# ---- torch: the LibTorch stable ABI of 2.11, so that one binary serves every later torch
set(DACO_RT_TORCH_VERSION "")
set(DACO_RT_TORCH_STATE "not built: DACO_RT_TORCH=OFF")
if(NOT DACO_RT_TORCH STREQUAL "OFF")
  daco_rt_python_package(torch torch_path torch_version)
  if(NOT torch_path)
    daco_rt_skip(TORCH "torch is not installed for ${Python_EXECUTABLE}")
  elseif(torch_version VERSION_LESS 2.11)
    daco_rt_skip(TORCH "torch ${torch_version} is older than 2.11")
  elseif(NOT EXISTS "${torch_path}/include/torch/csrc/stable/library.h")
    daco_rt_skip(TORCH "no headers in ${torch_path}")
  else()
    set(DACO_RT_TORCH_VERSION "${torch_version}")
    set(DACO_RT_TORCH_STATE "built on torch ${torch_version}, runs in torch 2.11 and later")
    add_library(daco_torch MODULE csrc/adapters/torch/library.cpp)
    target_compile_definitions(daco_torch PRIVATE TORCH_TARGET_VERSION=0x020b000000000000)
    target_compile_options(daco_torch PRIVATE "-ffile-prefix-map=${torch_path}/=")
    target_include_directories(daco_torch SYSTEM PRIVATE "${torch_path}/include")
    target_link_libraries(daco_torch PRIVATE daco_core daco_flags "${torch_path}/lib/libtorch_cpu.so")
    target_link_options(daco_torch PRIVATE -Wl,-z,defs)
    install(TARGETS daco_torch LIBRARY DESTINATION daco_rt/lib)
  endif()
endif()

# ---- ONNX Runtime: a custom-op library against headers of API 21, not linked to libonnxruntime
set(DACO_RT_ONNXRUNTIME_VERSION "")
set(DACO_RT_ONNXRUNTIME_STATE "not built: DACO_RT_ONNXRUNTIME=OFF")
if(NOT DACO_RT_ONNXRUNTIME STREQUAL "OFF")
  find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h
            HINTS "${CMAKE_CURRENT_SOURCE_DIR}/build/deps/onnxruntime/include"
            PATH_SUFFIXES onnxruntime onnxruntime/core/session
            DOC "folder of onnxruntime_cxx_api.h")
  if(NOT ONNXRUNTIME_INCLUDE_DIR)
    # find_path remembers a failure; the next configure must look again once the headers were fetched.
    unset(ONNXRUNTIME_INCLUDE_DIR CACHE)
    daco_rt_skip(ONNXRUNTIME "no headers; run cmake/fetch_onnxruntime_headers.sh or set ONNXRUNTIME_INCLUDE_DIR")
  else()
    file(STRINGS "${ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_c_api.h" line REGEX "^#define ORT_API_VERSION [0-9]+")
    string(REGEX MATCH "[0-9]+" DACO_RT_ONNXRUNTIME_VERSION "${line}")
    if(DACO_RT_ONNXRUNTIME_VERSION LESS 18)
      daco_rt_skip(ONNXRUNTIME "headers of API ${DACO_RT_ONNXRUNTIME_VERSION}, older than 18")
      set(DACO_RT_ONNXRUNTIME_VERSION "")
    else()
      set(DACO_RT_ONNXRUNTIME_STATE
          "built on API ${DACO_RT_ONNXRUNTIME_VERSION}, runs in ONNX Runtime 1.${DACO_RT_ONNXRUNTIME_VERSION} and later")
      add_library(daco_onnxruntime MODULE csrc/adapters/onnxruntime/host.cpp
                                          csrc/adapters/onnxruntime/kernels.cpp
                                          csrc/adapters/onnxruntime/library.cpp)
      target_include_directories(daco_onnxruntime SYSTEM PRIVATE "${ONNXRUNTIME_INCLUDE_DIR}")
      target_link_libraries(daco_onnxruntime PRIVATE daco_core daco_flags Threads::Threads)
      target_link_options(daco_onnxruntime PRIVATE -Wl,-z,defs)
      install(TARGETS daco_onnxruntime LIBRARY DESTINATION daco_rt/lib)
    endif()
  endif()
endif()

# ---- numpy: the extension module; the stable ABI where Python has what nanobind needs of it (3.12)
set(DACO_RT_PYTHON_STATE "not built: DACO_RT_PYTHON=OFF")
if(DACO_RT_PYTHON)
  if(NOT Python_Development.Module_FOUND)
    set(DACO_RT_PYTHON_STATE "not built: no headers of Python (Debian: python3-dev)")
  else()
    daco_rt_python_package(nanobind nanobind_path nanobind_version)
    if(NOT nanobind_path)
      set(DACO_RT_PYTHON_STATE "not built: nanobind is not installed")
    else()
      set(DACO_RT_PYTHON_STATE "built for Python ${Python_VERSION} with nanobind ${nanobind_version}")
      find_package(nanobind CONFIG REQUIRED PATHS "${nanobind_path}/cmake" NO_DEFAULT_PATH)
      configure_file(csrc/adapters/numpy/build_info.h.in generated/build_info.h @ONLY)
      nanobind_add_module(_core STABLE_ABI NB_STATIC csrc/adapters/numpy/module.cpp)
      target_include_directories(_core PRIVATE "${CMAKE_CURRENT_BINARY_DIR}/generated")
      target_link_libraries(_core PRIVATE daco_core Threads::Threads)
      install(TARGETS _core LIBRARY DESTINATION daco_rt)
    endif()
  endif()
endif()
