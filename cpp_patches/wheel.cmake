# Read right after project(llama_cpp): the wheel needs libllama only. Upstream forces `common`
# into the cache, which this variable hides; building it would double the time.
set(LLAMA_BUILD_COMMON OFF)

# With the CPU backend in variants (GGML_BACKEND_DL) each is a module, which upstream installs beside
# programs; they belong beside libllama, where the patched library looks for them.
function(skipcat_install_backends)
    if (NOT GGML_BACKEND_DL)
        return()
    endif()
    foreach (backend IN LISTS GGML_AVAILABLE_BACKENDS)
        set_target_properties(${backend} PROPERTIES INSTALL_RPATH "$ORIGIN" BUILD_WITH_INSTALL_RPATH TRUE)
        install(TARGETS ${backend} LIBRARY DESTINATION ${SKBUILD_PLATLIB_DIR}/llama_cpp/lib)
    endforeach()
endfunction()
cmake_language(DEFER CALL skipcat_install_backends)
