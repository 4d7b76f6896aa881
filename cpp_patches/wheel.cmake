# Read right after project(llama_cpp): the wheel needs libllama only. Upstream forces `common`
# into the cache, which this variable hides; building it would double the time.
set(LLAMA_BUILD_COMMON OFF)
