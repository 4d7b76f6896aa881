// The structure of a GGUF file, read once before llama.cpp reads it: what does not add up is refused with the name of
// the key or the tensor, and a low-rank file may not ask for more memory than its size accounts for.
//
// Nothing is kept, so that this costs no memory. Files of other versions or byte orders are left to llama.cpp.

#include "skipcat-impl.h"
#include "skipcat-reader.h"

#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

// what llama.cpp holds for each, with the nodes of its tables
static constexpr uint64_t BYTES_PER_KEY    = 512;
static constexpr uint64_t BYTES_PER_STRING = 192;
static constexpr uint64_t BYTES_PER_MERGE  = 144;
static constexpr uint64_t BYTES_PER_TENSOR = 2048;
static constexpr uint64_t COPIES           = 4;
static constexpr uint64_t SHORT_STRING     = 15; // no longer ones are held in the string itself

// besides twice the size of the file, of which the weights take one: a model that is small otherwise may have a
// vocabulary such as Llama 3's
static constexpr uint64_t ALLOWANCE = 64*1024*1024;

static constexpr uint64_t MAX_KEY_LENGTH = 65535; // GGUF's own limit

// the fewest bytes that a key and a tensor take in the file
static constexpr uint64_t MIN_KEY_SIZE    = 8 + 1 + 4 + 1;
static constexpr uint64_t MIN_TENSOR_SIZE = 8 + 1 + 4 + 4 + 8;

// bytes of a number, 0 for a string, an array or a type that GGUF does not know
static uint64_t type_size(int32_t type) {
    switch (type) {
        case GGUF_TYPE_UINT8:
        case GGUF_TYPE_INT8:
        case GGUF_TYPE_BOOL:
            return 1;
        case GGUF_TYPE_UINT16:
        case GGUF_TYPE_INT16:
            return 2;
        case GGUF_TYPE_UINT32:
        case GGUF_TYPE_INT32:
        case GGUF_TYPE_FLOAT32:
            return 4;
        case GGUF_TYPE_UINT64:
        case GGUF_TYPE_INT64:
        case GGUF_TYPE_FLOAT64:
            return 8;
        default:
            return 0;
    }
}

// a * b, false where it has more than 63 bits
static bool multiply(uint64_t & a, uint64_t b) {
    if (b != 0 && a > INT64_MAX/b) {
        return false;
    }
    a *= b;
    return true;
}

// what was read, for messages and limits
struct skipcat_scan {
    skipcat_reader in;
    uint64_t    alignment  = GGUF_DEFAULT_ALIGNMENT;
    std::string arch;
    bool        is_split   = false;
    bool        is_low_rank = false;
    uint64_t    memory     = 0; // that llama.cpp needs for what was read
    uint64_t    of_key     = 0; // the same for the latest key
    uint64_t    most       = 0; // and for the key that needs most
    std::string most_name;
    uint64_t    data_size  = 0; // of the tensors so far, each with its padding

    explicit skipcat_scan(FILE * file) : in(file) {}

    void check();
    void check_key(uint64_t i);
    void check_value(const std::string & key, int32_t type);
    void check_array(const std::string & key);
    void check_string(const std::string & key, uint64_t & length);
    void check_tensor(uint64_t i);

    // `what`: "key" or "tensor"
    std::string read_name(const char * what, uint64_t i, uint64_t max_length) {
        uint64_t length;
        if (!in.read(length)) {
            throw std::runtime_error(format("the file ends before %s %llu", what, (unsigned long long) i));
        }
        if (length == 0 || length > max_length) {
            throw std::runtime_error(format("%s %llu has a name of %llu bytes, but names have 1 to %llu",
                    what, (unsigned long long) i, (unsigned long long) length, (unsigned long long) max_length));
        }
        std::string name(std::min(length, in.left()), '\0');
        if (!in.read(&name[0], length)) {
            throw std::runtime_error(format("the file ends in the name of %s %llu", what, (unsigned long long) i));
        }
        return name;
    }

    template <typename T> T require(const char * what, const std::string & name) {
        T value;
        if (!in.read(value)) {
            throw std::runtime_error(format("the file ends in %s '%s'", what, name.c_str()));
        }
        return value;
    }

    void hold(const std::string & key, uint64_t nbytes) {
        memory += nbytes;
        of_key += nbytes;
        if (of_key > most) {
            most      = of_key;
            most_name = key;
        }
    }

    void check_memory(const char * what, const std::string & name) const {
        if (is_low_rank && memory > in.size + ALLOWANCE) {
            throw std::runtime_error(format("%s '%s' asks for more memory than a file of %llu bytes accounts for",
                    what, name.c_str(), (unsigned long long) in.size));
        }
    }
};

void skipcat_scan::check() {
    char     magic[4];
    uint32_t version;
    if (!in.read(magic) || memcmp(magic, GGUF_MAGIC, sizeof(magic)) != 0 || !in.read(version) || version < 2 || version > GGUF_VERSION) {
        return;
    }
    uint64_t n_tensors;
    uint64_t n_keys;
    if (!in.read(n_tensors) || !in.read(n_keys)) {
        throw std::runtime_error("the file ends in its header");
    }
    if (n_keys > in.left()/MIN_KEY_SIZE) {
        throw std::runtime_error(format("the header counts %llu keys, more than the file can hold", (unsigned long long) n_keys));
    }
    if (n_tensors > in.left()/MIN_TENSOR_SIZE) {
        throw std::runtime_error(format("the header counts %llu tensors, more than the file can hold", (unsigned long long) n_tensors));
    }
    for (uint64_t i = 0; i < n_keys; i++) {
        check_key(i);
    }
    if (arch.empty()) {
        throw std::runtime_error("key 'general.architecture' is missing or not a string");
    }
    is_low_rank = arch != skipcat_base_arch(arch);
    if (is_low_rank && is_split) {
        throw std::runtime_error("key 'split.count' stands for a model in several files, which a low-rank one cannot be");
    }
    // data is used where it lies, which asks for ggml's own alignment
    if (is_low_rank && alignment % GGUF_DEFAULT_ALIGNMENT != 0) {
        throw std::runtime_error(format("key 'general.alignment' is %llu, but low-rank models need a multiple of %d",
                (unsigned long long) alignment, GGUF_DEFAULT_ALIGNMENT));
    }
    check_memory("key", most_name);
    for (uint64_t i = 0; i < n_tensors; i++) {
        check_tensor(i);
    }
}

void skipcat_scan::check_key(uint64_t i) {
    const std::string key = read_name("key", i, MAX_KEY_LENGTH);
    of_key = 0;
    hold(key, BYTES_PER_KEY + COPIES*key.size());

    const int32_t type = require<int32_t>("key", key);
    if (key == "general.alignment" && type == GGUF_TYPE_UINT32) {
        alignment = require<uint32_t>("key", key);
        if (alignment == 0 || (alignment & (alignment - 1)) != 0) {
            throw std::runtime_error(format("key 'general.alignment' is %llu, which is no power of 2", (unsigned long long) alignment));
        }
        return;
    }
    if (key == "split.count" && type == GGUF_TYPE_UINT16) {
        is_split = require<uint16_t>("key", key) > 1;
        return;
    }
    if (key == "general.architecture" && type == GGUF_TYPE_STRING) {
        uint64_t length;
        check_string(key, length);
        arch.resize(length);
        in.read(&arch[0], length);
        return;
    }
    check_value(key, type);
}

// leaves the reader before the string
void skipcat_scan::check_string(const std::string & key, uint64_t & length) {
    length = require<uint64_t>("key", key);
    if (length > in.left()) {
        throw std::runtime_error(format("key '%s' has a string of %llu bytes, which passes the end of the file", key.c_str(), (unsigned long long) length));
    }
    hold(key, length > SHORT_STRING ? COPIES*(length + SHORT_STRING) : 0);
}

void skipcat_scan::check_value(const std::string & key, int32_t type) {
    if (type == GGUF_TYPE_ARRAY) {
        check_array(key);
    } else if (type == GGUF_TYPE_STRING) {
        uint64_t length;
        check_string(key, length);
        in.skip(length);
    } else {
        const uint64_t size = type_size(type);
        if (size == 0) {
            throw std::runtime_error(format("key '%s' has type %d, which GGUF does not know", key.c_str(), type));
        }
        if (!in.skip(size)) {
            throw std::runtime_error(format("the file ends in key '%s'", key.c_str()));
        }
    }
}

void skipcat_scan::check_array(const std::string & key) {
    const int32_t  type = require<int32_t>("key", key);
    const uint64_t n    = require<uint64_t>("key", key);
    // a string takes the 8 bytes of its length at least
    const uint64_t size = type == GGUF_TYPE_STRING ? sizeof(uint64_t) : type_size(type);
    if (size == 0) {
        throw std::runtime_error(format("key '%s' has elements of type %d, which GGUF does not know", key.c_str(), type));
    }
    if (n > in.left()/size) {
        throw std::runtime_error(format("key '%s' has %llu elements, which pass the end of the file", key.c_str(), (unsigned long long) n));
    }
    if (type != GGUF_TYPE_STRING) {
        hold(key, COPIES*n*size);
        in.skip(n*size);
        return;
    }
    hold(key, n*(key == "tokenizer.ggml.merges" ? BYTES_PER_MERGE : BYTES_PER_STRING));
    for (uint64_t i = 0; i < n; i++) {
        uint64_t length;
        check_string(key, length);
        in.skip(length);
    }
}

void skipcat_scan::check_tensor(uint64_t i) {
    const std::string name = read_name("tensor", i, GGML_MAX_NAME - 1);
    memory += BYTES_PER_TENSOR;
    check_memory("tensor", name);

    const uint32_t n_dims = require<uint32_t>("tensor", name);
    if (n_dims > GGML_MAX_DIMS) {
        throw std::runtime_error(format("tensor '%s' has %u dimensions, but ggml knows %d", name.c_str(), n_dims, GGML_MAX_DIMS));
    }
    uint64_t n_elements = 1;
    uint64_t ne0        = 1;
    bool     fits       = true;
    for (uint32_t j = 0; j < n_dims; j++) {
        const int64_t ne = require<int64_t>("tensor", name);
        fits = fits && ne >= 0 && multiply(n_elements, ne);
        ne0  = j == 0 ? ne : ne0;
    }
    const int32_t type = require<int32_t>("tensor", name);
    if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) type) == 0) {
        throw std::runtime_error(format("tensor '%s' has type %d, which ggml does not know", name.c_str(), type));
    }
    const uint64_t block = ggml_blck_size((ggml_type) type);
    uint64_t nbytes = n_elements/block;
    if (!fits || !multiply(nbytes, ggml_type_size((ggml_type) type)) || nbytes > in.size) {
        throw std::runtime_error(format("tensor '%s' has a shape of more bytes than the file", name.c_str()));
    }
    if (ne0 % block != 0) {
        throw std::runtime_error(format("tensor '%s' has rows of %llu elements, which are no whole blocks of %s",
                name.c_str(), (unsigned long long) ne0, ggml_type_name((ggml_type) type)));
    }
    const uint64_t offset = require<uint64_t>("tensor", name);
    if (offset != data_size) {
        throw std::runtime_error(format("tensor '%s' has its data at offset %llu instead of %llu",
                name.c_str(), (unsigned long long) offset, (unsigned long long) data_size));
    }
    if (offset > in.size - nbytes) {
        throw std::runtime_error(format("tensor '%s' has data that passes the end of the file", name.c_str()));
    }
    data_size += (nbytes + alignment - 1)/alignment*alignment;
}

void skipcat_check_file(FILE * file) {
    skipcat_scan(file).check();
}

void skipcat_check_file(const char * path) {
    FILE * file = ggml_fopen(path, "rb");
    if (file == nullptr) {
        return; // which llama.cpp says better
    }
    try {
        skipcat_check_file(file);
    } catch (...) {
        fclose(file);
        throw;
    }
    fclose(file);
}
