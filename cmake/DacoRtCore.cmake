# daco_core: validation, planning and the CPU kernels, free of any framework.

include(csrc/sources.cmake)

# Refuses when the user insisted on what cannot be built, else remembers the reason.
macro(daco_rt_skip name reason)
  if(DACO_RT_${name} STREQUAL "ON")
    message(FATAL_ERROR "DACO_RT_${name}=ON: ${reason}")
  endif()
  set(DACO_RT_${name}_STATE "not built: ${reason}")
endmacro()

find_package(Git QUIET)
set(DACO_RT_COMMIT "unknown")
if(NOT "$ENV{DACO_RT_COMMIT}" STREQUAL "")  # sources that were copied without their repository
  set(DACO_RT_COMMIT "$ENV{DACO_RT_COMMIT}")
elseif(Git_FOUND AND EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.git")
  execute_process(
    COMMAND "${GIT_EXECUTABLE}" describe --always --dirty --abbrev=12 --exclude=*
    WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
    OUTPUT_VARIABLE described RESULT_VARIABLE failed
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(NOT failed)
    set(DACO_RT_COMMIT "${described}")
  endif()
endif()

set(DACO_RT_ISAS "scalar")
if(DACO_CPU_AVX2_SOURCES)
  string(APPEND DACO_RT_ISAS " avx2")
endif()
if(DACO_CPU_AVX512_SOURCES)
  string(APPEND DACO_RT_ISAS " avx512")
endif()

add_library(daco_core STATIC ${DACO_CORE_SOURCES} ${DACO_CPU_SOURCES} ${DACO_CPU_AVX2_SOURCES}
                             ${DACO_CPU_AVX512_SOURCES} csrc/adapters/operands.cpp)
target_include_directories(daco_core PUBLIC csrc)

# What every target of this project compiles with.
add_library(daco_flags INTERFACE)
# The prefix map keeps the builder's folders out of assertion messages.
target_compile_options(
  daco_flags INTERFACE -Wall -Wextra $<$<BOOL:${DACO_RT_WERROR}>:-Werror>
                       "-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=")
target_link_libraries(daco_core PRIVATE daco_flags)
