// The libFuzzer target: bytes as a file in memory. Half of the mutations change one field of the header, a key, a tensor's
// info or a mask in its place, so that what stands behind it is still read.

#include "load_model.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_backend_init();
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const int file = memfd_create("model", 0);
    if (file < 0 || ftruncate(file, 0) != 0 || pwrite(file, data, size, 0) != (ssize_t) size) {
        abort();
    }
    static const std::string path = "/proc/self/fd/" + std::to_string(file);
    load_model(path.c_str(), size % 2 == 0);
    return 0;
}

namespace {

struct field {
    size_t begin;
    size_t size;
};

// the fields of a GGUF file, as far as it can be read; masks are found by their tensors
struct fields_of {
    const uint8_t *    data;
    size_t             size;
    size_t             pos = 0;
    std::vector<field> found;
    std::vector<field> masks;

    fields_of(const uint8_t * data, size_t size) : data(data), size(size) {
        number<uint32_t>();
        number<uint32_t>();
        const uint64_t n_tensors = number<uint64_t>();
        const uint64_t n_keys    = number<uint64_t>();
        for (uint64_t i = 0; i < n_keys && pos < size; i++) {
            string();
            value(number<uint32_t>());
        }
        std::vector<uint64_t> offsets;
        for (uint64_t i = 0; i < n_tensors && pos < size; i++) {
            tensor(offsets);
        }
        const size_t begin = (pos + 31)/32*32;
        for (const uint64_t offset : offsets) {
            if (offset < size && begin + offset + 4 <= size) {
                masks.push_back({ begin + (size_t) offset, 4 });
            }
        }
    }

    template <typename T> T number() {
        T value = 0;
        if (pos + sizeof(T) > size) {
            pos = size;
            return value;
        }
        memcpy(&value, data + pos, sizeof(T));
        found.push_back({ pos, sizeof(T) });
        pos += sizeof(T);
        return value;
    }

    void bytes(uint64_t n) {
        n = std::min<uint64_t>(n, size - pos);
        if (n > 0) {
            found.push_back({ pos, (size_t) n });
        }
        pos += n;
    }

    std::string string() {
        const uint64_t n     = number<uint64_t>();
        const size_t   begin = pos;
        bytes(n);
        return std::string((const char *) data + begin, pos - begin);
    }

    void value(uint32_t type) {
        static const size_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
        if (type == 8) {
            string();
        } else if (type == 9) {
            const uint32_t item = number<uint32_t>();
            const uint64_t n    = number<uint64_t>();
            if (item == 8) {
                for (uint64_t i = 0; i < n && pos < size; i++) {
                    string();
                }
            } else if (item < 13 && n < size) {
                bytes(n*sizes[item]);
            }
        } else if (type < 13) {
            bytes(sizes[type]);
        }
    }

    void tensor(std::vector<uint64_t> & offsets) {
        const std::string name   = string();
        const uint32_t    n_dims = number<uint32_t>();
        for (uint32_t j = 0; j < n_dims && pos < size; j++) {
            number<uint64_t>();
        }
        number<uint32_t>();
        const uint64_t offset = number<uint64_t>();
        if (name.find("skip_mask") != std::string::npos) {
            offsets.push_back(offset);
        }
    }
};

} // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned int seed) {
    std::minstd_rand random(seed);
    if (random() % 8 == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    const fields_of fields(data, size);
    for (unsigned n = 1 + random() % 3; n > 0; n--) {
        const auto & from = fields.masks.empty() || random() % 8 != 0 ? fields.found : fields.masks;
        if (from.empty()) {
            return LLVMFuzzerMutate(data, size, max_size);
        }
        const field & to = from[random() % from.size()];
        uint8_t * p = data + to.begin;
        switch (random() % 4) {
            case 0: { // a number at the edge of something
                static const uint64_t edges[] = { 0, 1, 2, 7, 8, 32, 255, 0x7fffffff, 0x80000000, 0xffffffff, INT64_MAX, UINT64_MAX };
                memcpy(p, &edges[random() % (sizeof(edges)/sizeof(edges[0]))], std::min<size_t>(to.size, 8));
            } break;
            case 1: { // what another field of this size has
                const field & other = from[random() % from.size()];
                memmove(p, data + other.begin, std::min(to.size, other.size));
            } break;
            case 2:
                p[random() % to.size] ^= 1 << random() % 8;
                break;
            default: {
                std::vector<uint8_t> changed(p, p + to.size);
                LLVMFuzzerMutate(changed.data(), changed.size(), changed.size());
                memcpy(p, changed.data(), changed.size());
            } break;
        }
    }
    return size;
}
