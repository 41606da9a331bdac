# The second module, mwm._cuda: nvcc compiles csrc/cuda/*.cu, the host compiler the binding. nvcc is called directly and not as a CMake
# language, so that a machine without it, or with one that refuses the host compiler, configures like any other.
#
# MWM_CUDA: ON makes what is missing an error; AUTO goes on without the module. Either way one line says what happened: printed here,
# installed as mwm/_cuda_build.py, repeated by `mwm info`.

set(MWM_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set(MWM_CUDA_ARCHITECTURES "80;90" CACHE STRING "Compute capabilities with machine code of their own; the last also becomes PTX")
set(MWM_CUDA_STATE "")

if(MWM_CUDA STREQUAL "OFF")
  set(MWM_CUDA_STATE "switched off by -DMWM_CUDA=OFF")
elseif(NOT MWM_CUDA MATCHES "^(ON|AUTO)$")
  message(FATAL_ERROR "MWM_CUDA must be AUTO, ON or OFF, got ${MWM_CUDA}.")
else()
  find_package(CUDAToolkit QUIET)
  if(NOT CUDAToolkit_NVCC_EXECUTABLE)
    set(MWM_CUDA_STATE "nvcc was not found (set CUDACXX or CUDAToolkit_ROOT)")
  elseif(CUDAToolkit_VERSION VERSION_LESS 12.0)
    set(MWM_CUDA_STATE "nvcc is version ${CUDAToolkit_VERSION}; it must be 12.0 or later")
  elseif(NOT TARGET CUDA::cudart_static)
    set(MWM_CUDA_STATE "the CUDA toolkit ${CUDAToolkit_VERSION} has no static runtime (libcudart_static.a)")
  else()
    set(MWM_NVCC_FLAGS -std=c++17 -O3 -ccbin ${CMAKE_CXX_COMPILER} -cudart static -Xcompiler -fPIC,-fvisibility=hidden)
    foreach(SM IN LISTS MWM_CUDA_ARCHITECTURES)
      list(APPEND MWM_NVCC_FLAGS -gencode arch=compute_${SM},code=sm_${SM})
    endforeach()
    list(GET MWM_CUDA_ARCHITECTURES -1 LAST)
    list(APPEND MWM_NVCC_FLAGS -gencode arch=compute_${LAST},code=compute_${LAST})
    # One real source with the real flags: an unknown architecture or a host compiler that is too new shows here.
    execute_process(COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} ${MWM_NVCC_FLAGS} -c ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/build_plan.cu
      -o ${CMAKE_CURRENT_BINARY_DIR}/cuda_probe.o RESULT_VARIABLE MWM_PROBE ERROR_VARIABLE MWM_PROBE_ERROR OUTPUT_VARIABLE MWM_PROBE_ERROR)
    if(NOT MWM_PROBE EQUAL 0)
      string(REGEX MATCH "[^\n]*(error|fatal)[^\n]*" MWM_PROBE_LINE "${MWM_PROBE_ERROR}")
      set(MWM_CUDA_STATE "nvcc ${CUDAToolkit_VERSION} with ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} does not compile the kernels: ${MWM_PROBE_LINE}")
    endif()
  endif()
endif()

if(MWM_CUDA_STATE)
  if(MWM_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MWM_CUDA=ON, but ${MWM_CUDA_STATE}. ${MWM_PROBE_ERROR}")
  endif()
  message(STATUS "No CUDA kernels: ${MWM_CUDA_STATE}")
else()
  list(JOIN MWM_CUDA_ARCHITECTURES ", sm_" MWM_CUDA_NAMES)
  set(MWM_CUDA_STATE "built by nvcc ${CUDAToolkit_VERSION} for sm_${MWM_CUDA_NAMES} and PTX for later devices")
  message(STATUS "CUDA kernels: ${MWM_CUDA_STATE}")
  file(GLOB MWM_CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu)
  set(MWM_CUDA_OBJECTS "")
  foreach(SOURCE IN LISTS MWM_CUDA_SOURCES)
    get_filename_component(NAME ${SOURCE} NAME)
    set(OBJECT ${CMAKE_CURRENT_BINARY_DIR}/${NAME}.o)
    add_custom_command(OUTPUT ${OBJECT} DEPFILE ${OBJECT}.d DEPENDS ${SOURCE} VERBATIM COMMENT "Building CUDA object ${NAME}.o"
      COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} ${MWM_NVCC_FLAGS} -MD -MF ${OBJECT}.d -MT ${OBJECT} -c ${SOURCE} -o ${OBJECT})
    list(APPEND MWM_CUDA_OBJECTS ${OBJECT})
  endforeach()
  pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/cuda_module.cpp csrc/fail.cpp ${MWM_CUDA_OBJECTS})
  target_compile_options(_cuda PRIVATE -Wall -Wextra)
  target_link_libraries(_cuda PRIVATE CUDA::cudart_static Threads::Threads ${CMAKE_DL_LIBS})
  # The static runtime's symbols stay inside, away from the runtime that torch has loaded.
  target_link_options(_cuda PRIVATE LINKER:--exclude-libs,ALL)
  install(TARGETS _cuda LIBRARY DESTINATION mwm)
endif()

string(REGEX REPLACE "[\\\\\"]" "'" MWM_CUDA_STATE "${MWM_CUDA_STATE}")
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/_cuda_build.py CONTENT [["""Written by the build."""

STATE = "@MWM_CUDA_STATE@"
]] @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_cuda_build.py DESTINATION mwm)
