# Finds libtorch without find_package(Torch), which wants the whole CUDA toolkit even to link. Links torch_cpu and c10 only: libtorch.so itself needs
# libtorch_cuda.so in CUDA builds, and one addon must serve both (the CUDA libraries are loaded at run time where they are).
#
# Looks in: $LIBTORCH, the torch of python3 if LIBTORCH_USE_PYTORCH=1, martlet's cache, the system.
# Gives: target Libtorch::libtorch; LIBTORCH_ROOT, LIBTORCH_LIB_DIR, LIBTORCH_VERSION.

set(_libtorch_hints)
if(DEFINED ENV{LIBTORCH})
  list(APPEND _libtorch_hints "$ENV{LIBTORCH}" "$ENV{LIBTORCH}/torch")
elseif("$ENV{LIBTORCH_USE_PYTORCH}" STREQUAL "1")
  execute_process(
    COMMAND python3 -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE _libtorch_python OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(APPEND _libtorch_hints "${_libtorch_python}")
else()
  if(DEFINED ENV{MARTLET_CACHE})
    set(_libtorch_cache "$ENV{MARTLET_CACHE}")
  elseif(DEFINED ENV{XDG_CACHE_HOME})
    set(_libtorch_cache "$ENV{XDG_CACHE_HOME}/martlet")
  else()
    set(_libtorch_cache "$ENV{HOME}/.cache/martlet")
  endif()
  # A CUDA build serves the CPU too, so it goes first.
  file(GLOB _libtorch_cuda LIST_DIRECTORIES true "${_libtorch_cache}/libtorch/*-cuda*/torch")
  file(GLOB _libtorch_cpu LIST_DIRECTORIES true "${_libtorch_cache}/libtorch/*-cpu/torch")
  list(SORT _libtorch_cuda COMPARE NATURAL ORDER DESCENDING)
  list(SORT _libtorch_cpu COMPARE NATURAL ORDER DESCENDING)
  list(APPEND _libtorch_hints ${_libtorch_cuda} ${_libtorch_cpu} /usr /usr/local)
endif()

# Another LIBTORCH in the environment must not be shadowed by what an earlier configure found.
unset(LIBTORCH_INCLUDE_DIR CACHE)
unset(LIBTORCH_CPU_LIBRARY CACHE)
unset(LIBTORCH_C10_LIBRARY CACHE)
find_path(LIBTORCH_INCLUDE_DIR torch/csrc/api/include/torch/version.h HINTS ${_libtorch_hints} PATH_SUFFIXES include NO_DEFAULT_PATH)
find_library(LIBTORCH_CPU_LIBRARY torch_cpu HINTS ${_libtorch_hints} PATH_SUFFIXES lib NO_DEFAULT_PATH)
find_library(LIBTORCH_C10_LIBRARY c10 HINTS ${_libtorch_hints} PATH_SUFFIXES lib NO_DEFAULT_PATH)

if(LIBTORCH_INCLUDE_DIR)
  set(_libtorch_header "${LIBTORCH_INCLUDE_DIR}/torch/csrc/api/include/torch/version.h")
  if(EXISTS "${LIBTORCH_INCLUDE_DIR}/torch/headeronly/version.h")
    set(_libtorch_header "${LIBTORCH_INCLUDE_DIR}/torch/headeronly/version.h")
  endif()
  file(STRINGS "${_libtorch_header}" _libtorch_lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  set(LIBTORCH_VERSION "")
  foreach(_part MAJOR MINOR PATCH)
    if("${_libtorch_lines}" MATCHES "TORCH_VERSION_${_part} ([0-9]+)")
      string(APPEND LIBTORCH_VERSION ".${CMAKE_MATCH_1}")
    endif()
  endforeach()
  string(REGEX REPLACE "^\\." "" LIBTORCH_VERSION "${LIBTORCH_VERSION}")
endif()

string(REPLACE ";" ", " _libtorch_looked "${_libtorch_hints}")
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  Libtorch
  REQUIRED_VARS LIBTORCH_CPU_LIBRARY LIBTORCH_C10_LIBRARY LIBTORCH_INCLUDE_DIR
  VERSION_VAR LIBTORCH_VERSION
  REASON_FAILURE_MESSAGE
    "Looked in ${_libtorch_looked}. Install it with `npx martlet libtorch install`, or set LIBTORCH=/path/to/libtorch, or LIBTORCH_USE_PYTORCH=1.")

if(Libtorch_FOUND)
  if(LIBTORCH_VERSION VERSION_LESS 2.11 OR LIBTORCH_VERSION VERSION_GREATER_EQUAL 2.15)
    message(FATAL_ERROR "libtorch ${LIBTORCH_VERSION} in ${LIBTORCH_INCLUDE_DIR} is not supported; martlet builds against 2.11 to 2.14.")
  endif()
  get_filename_component(LIBTORCH_LIB_DIR "${LIBTORCH_CPU_LIBRARY}" DIRECTORY)
  get_filename_component(LIBTORCH_ROOT "${LIBTORCH_LIB_DIR}" DIRECTORY)
  if(NOT TARGET Libtorch::libtorch)
    add_library(Libtorch::libtorch INTERFACE IMPORTED)
    set_target_properties(
      Libtorch::libtorch
      PROPERTIES INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${LIBTORCH_INCLUDE_DIR};${LIBTORCH_INCLUDE_DIR}/torch/csrc/api/include"
                 INTERFACE_INCLUDE_DIRECTORIES "${LIBTORCH_INCLUDE_DIR};${LIBTORCH_INCLUDE_DIR}/torch/csrc/api/include"
                 INTERFACE_LINK_LIBRARIES "${LIBTORCH_CPU_LIBRARY};${LIBTORCH_C10_LIBRARY}")
  endif()
endif()
