# Read after every project() of a build. GCC 12 miscompiles ggml's AMX code (the tile
# configuration is optimised away, and the first Q4_0 or Q8_0 product is an illegal instruction),
# and no device this project is for has AMX. The options stand before -march=native, which
# otherwise turns AMX on.
include(CheckCCompilerFlag)
check_c_compiler_flag(-mno-amx-int8 SKIPCAT_COMPILER_KNOWS_AMX)
if (SKIPCAT_COMPILER_KNOWS_AMX)
    add_compile_options(-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
endif()
