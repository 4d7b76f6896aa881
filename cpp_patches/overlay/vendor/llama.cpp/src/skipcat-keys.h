#pragma once

#include "llama-impl.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

struct llama_model_loader;

// the keys of a low-rank file, by type: a key of another type is none
struct skipcat_keys {
    const gguf_context * meta;
    const std::string    arch;

    skipcat_keys(const gguf_context * meta, const std::string & arch) : meta(meta), arch(arch) {}

    int64_t find(const std::string & key, gguf_type type) const {
        const int64_t id = gguf_find_key(meta, key.c_str());
        return id >= 0 && gguf_get_kv_type(meta, id) == type ? id : -1;
    }

    std::string full(const char * name) const {
        return arch + "." + name;
    }

    // the key's number, else `otherwise`
    int64_t number(const std::string & key, int64_t otherwise) const {
        const int64_t id = find(key, GGUF_TYPE_UINT32);
        return id < 0 ? otherwise : gguf_get_val_u32(meta, id);
    }

    bool flag(const std::string & key, bool otherwise) const {
        const int64_t id = find(key, GGUF_TYPE_BOOL);
        return id < 0 ? otherwise : gguf_get_val_bool(meta, id);
    }

    std::string string(const std::string & key) const {
        const int64_t id = find(key, GGUF_TYPE_STRING);
        return id < 0 ? "" : gguf_get_val_str(meta, id);
    }

    // a number, or one for each layer
    std::vector<int64_t> numbers(const std::string & key) const {
        const int64_t id = find(key, GGUF_TYPE_ARRAY);
        if (id < 0) {
            const int64_t value = number(key, -1);
            return value < 0 ? std::vector<int64_t>() : std::vector<int64_t>{ value };
        }
        const gguf_type type = gguf_get_arr_type(meta, id);
        if (type != GGUF_TYPE_UINT32 && type != GGUF_TYPE_INT32) {
            return {};
        }
        const uint32_t * data = (const uint32_t *) gguf_get_arr_data(meta, id);
        return { data, data + gguf_get_arr_n(meta, id) };
    }

    // elements of an array of one of these types; -1 if the key is missing
    int64_t array_size(const std::string & key, std::initializer_list<gguf_type> types) const {
        const int64_t id = gguf_find_key(meta, key.c_str());
        if (id < 0) {
            return -1;
        }
        if (gguf_get_kv_type(meta, id) != GGUF_TYPE_ARRAY || std::find(types.begin(), types.end(), gguf_get_arr_type(meta, id)) == types.end()) {
            throw std::runtime_error(format("key '%s' is not an array of %s", key.c_str(), gguf_type_name(*types.begin())));
        }
        return gguf_get_arr_n(meta, id);
    }

    void require_between(const std::string & key, int64_t least, int64_t most) const {
        for (const int64_t value : numbers(key)) {
            if (value < least || value > most) {
                throw std::runtime_error(format("key '%s' is %lld, but it must be %lld to %lld",
                        key.c_str(), (long long) value, (long long) least, (long long) most));
            }
        }
    }

    // written so that it refuses NaN as well
    void require_float(const std::string & key, float least) const {
        const int64_t id = find(key, GGUF_TYPE_FLOAT32);
        if (id >= 0 && !(std::isfinite(gguf_get_val_f32(meta, id)) && gguf_get_val_f32(meta, id) >= least)) {
            throw std::runtime_error(format("key '%s' is %g, but it must be finite and at least %g",
                    key.c_str(), gguf_get_val_f32(meta, id), least));
        }
    }
};

void skipcat_check_vocabulary(const skipcat_keys & keys, const llama_model_loader & ml);
