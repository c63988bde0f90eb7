# What timings and verdicts hold for: the sources of the CPU kernels, and of what plans and launches the Metal kernels.
# The extension's own bytes would not do, they differ from build to build.
#
#   cmake -DROOT=<repository> -DKIND=cpu -P cmake/digest.cmake      prints a digest
set(MARLIN_DIGEST_cpu csrc/cpu csrc/format.h)
set(MARLIN_DIGEST_plan csrc/plan csrc/metal csrc/call.h csrc/format.h)

# The files under `root` that a kind of digest covers, by name.
function(marlin_digest_files kind root result)
  if(NOT CMAKE_SCRIPT_MODE_FILE)
    set(depends CONFIGURE_DEPENDS)
  endif()
  foreach(path IN LISTS MARLIN_DIGEST_${kind})
    if(IS_DIRECTORY "${root}/${path}")
      file(GLOB_RECURSE found ${depends} "${root}/${path}/*")
    elseif(EXISTS "${root}/${path}")
      set(found "${root}/${path}")
    else()
      message(FATAL_ERROR "the ${kind} digest covers ${path}, which is not in ${root}")
    endif()
    list(APPEND files ${found})
  endforeach()
  set(${result} "${files}" PARENT_SCOPE)
endfunction()

# SHA-256 of the names and contents of those files, and of `extra`: what else decides what is built.
function(marlin_digest kind root extra result)
  marlin_digest_files(${kind} "${root}" files)
  set(text "${extra}")
  foreach(file IN LISTS files)
    file(RELATIVE_PATH name "${root}" "${file}")
    file(SHA256 "${file}" digest)
    string(APPEND text " ${name} ${digest}")
  endforeach()
  string(SHA256 text "${text}")
  set(${result} "${text}" PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE)
  marlin_digest(${KIND} "${ROOT}" "" digest)
  message(NOTICE "${digest}")
endif()
