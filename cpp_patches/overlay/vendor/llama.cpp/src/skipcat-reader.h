#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#ifdef _WIN32
#define skipcat_ftell _ftelli64
#define skipcat_fseek _fseeki64
#else
#define skipcat_ftell ftello
#define skipcat_fseek fseeko
#endif

// a FILE from where it stands to its end, through a buffer; the FILE is put back
struct skipcat_reader {
    FILE *               file;
    int64_t              start;
    uint64_t             size = 0; // from start
    uint64_t             pos  = 0;
    std::vector<uint8_t> buffer;
    size_t               used   = 0;
    size_t               filled = 0;

    explicit skipcat_reader(FILE * file) : file(file), start(skipcat_ftell(file)), buffer(1 << 16) {
        if (start >= 0 && skipcat_fseek(file, 0, SEEK_END) == 0) {
            const int64_t end = skipcat_ftell(file);
            size = end > start ? end - start : 0;
        }
        rewind_file();
    }

    ~skipcat_reader() {
        rewind_file();
    }

    skipcat_reader(const skipcat_reader &) = delete;
    skipcat_reader & operator=(const skipcat_reader &) = delete;

    void rewind_file() const {
        if (start >= 0) {
            skipcat_fseek(file, start, SEEK_SET);
        }
    }

    uint64_t left() const {
        return size - pos;
    }

    // false where the file ends before
    bool read(void * dst, uint64_t n) {
        if (n > left()) {
            return false;
        }
        for (uint8_t * p = (uint8_t *) dst; n > 0;) {
            if (used == filled) {
                used   = 0;
                filled = fread(buffer.data(), 1, buffer.size(), file);
                if (filled == 0) {
                    return false;
                }
            }
            const size_t part = std::min<uint64_t>(n, filled - used);
            memcpy(p, buffer.data() + used, part);
            p    += part;
            used += part;
            pos  += part;
            n    -= part;
        }
        return true;
    }

    bool skip(uint64_t n) {
        if (n > left()) {
            return false;
        }
        pos += n;
        if (n <= filled - used) {
            used += n;
            return true;
        }
        used = filled = 0;
        return skipcat_fseek(file, start + (int64_t) pos, SEEK_SET) == 0;
    }

    template <typename T> bool read(T & value) {
        return read(&value, sizeof(value));
    }
};
