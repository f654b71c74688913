# llama-perplexity of llama.cpp's source in SOURCE, linked to the libraries in RUNTIME that llama-cpp-python computes with:
# both sides of the benchmark then run the same kernels, and a few minutes of compiling are saved.
cmake_minimum_required(VERSION 3.18)
project(llama-perplexity C CXX)
set(LLAMA_BUILD_COMMON ON)
set(LLAMA_BUILD_NUMBER 0)
# llama.cpp's own of warnings and licences.
function(llama_add_compile_flags)
endfunction()
function(license_add_file)
endfunction()
find_package(Threads REQUIRED)
add_library(llama INTERFACE)
target_include_directories(llama INTERFACE ${SOURCE}/include ${SOURCE}/ggml/include)
target_link_libraries(llama INTERFACE ${RUNTIME}/libllama.so ${RUNTIME}/libggml.so ${RUNTIME}/libggml-cpu.so
                      ${RUNTIME}/libggml-base.so)
add_subdirectory(${SOURCE}/vendor vendor EXCLUDE_FROM_ALL)
add_subdirectory(${SOURCE}/common common EXCLUDE_FROM_ALL)
add_subdirectory(${SOURCE}/tools/perplexity perplexity EXCLUDE_FROM_ALL)
# What reads arguments and templates is not what is timed: it may be slow, but not to compile.
target_compile_options(llama-common PRIVATE -O0 -w)
target_compile_options(cpp-httplib PRIVATE -O0)
target_precompile_headers(llama-common PRIVATE <algorithm> <filesystem> <fstream> <functional> <map> <memory> <regex> <set>
                          <sstream> <string> <thread> <unordered_map> <vector> ${SOURCE}/common/common.h)
