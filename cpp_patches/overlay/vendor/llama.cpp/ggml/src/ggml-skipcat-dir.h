#pragma once

#ifndef _WIN32
#include <dlfcn.h>
#endif

#include <string>

// the directory of the library that this is compiled into, null where the system does not tell
static const char * skipcat_library_dir() {
#ifdef _WIN32
    return nullptr;
#else
    static const std::string dir = [] {
        Dl_info info;
        if (dladdr((const void *) &skipcat_library_dir, &info) == 0 || info.dli_fname == nullptr) {
            return std::string();
        }
        const std::string path = info.dli_fname;
        const size_t slash = path.rfind('/');
        return slash == std::string::npos ? std::string(".") : path.substr(0, slash + 1);
    }();
    return dir.empty() ? nullptr : dir.c_str();
#endif
}
