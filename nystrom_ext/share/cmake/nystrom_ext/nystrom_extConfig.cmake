# find_package(nystrom_ext): the target nystrom_ext::nystrom, which is libnystrom.so, its header
# <nystrom_ext/nystrom.h>, and torch. Needs on CMAKE_PREFIX_PATH what Python's nystrom_ext.cmake_prefix_path and
# torch.utils.cmake_prefix_path say.
if(NOT TARGET torch)
  include(CMakeFindDependencyMacro)
  find_dependency(Torch)
endif()

get_filename_component(_nystrom_package "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT EXISTS "${_nystrom_package}/libnystrom.so" OR NOT EXISTS "${_nystrom_package}/include/nystrom_ext/nystrom.h")
  set(nystrom_ext_FOUND FALSE)
  set(nystrom_ext_NOT_FOUND_MESSAGE
      "${_nystrom_package} has no libnystrom.so and no header: the package is not built; install it with "
      "pip install --no-build-isolation")
elseif(NOT TARGET nystrom_ext::nystrom)
  add_library(nystrom_ext::nystrom SHARED IMPORTED)
  set_target_properties(
    nystrom_ext::nystrom
    PROPERTIES IMPORTED_LOCATION "${_nystrom_package}/libnystrom.so"
               IMPORTED_NO_SONAME TRUE # or programs would record the library's whole path
               INTERFACE_INCLUDE_DIRECTORIES "${_nystrom_package}/include"
               INTERFACE_COMPILE_FEATURES cxx_std_20 # torch's headers ask for it
               INTERFACE_LINK_LIBRARIES "${TORCH_LIBRARIES}")
endif()
unset(_nystrom_package)
