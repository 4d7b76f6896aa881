#include "skipcat-impl.h"

#include "llama-context.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#define SKIPCAT_RUNTIME_REVISION 8
#define SKIPCAT_FORMAT_VERSION   2

#define SKIPCAT_MAX_LEVELS 8

#define SKIPCAT_STR_(x) #x
#define SKIPCAT_STR(x) SKIPCAT_STR_(x)

static const char * const SKIPCAT_ARCH_PREFIX    = "skipcat-";
static const char * const SKIPCAT_RUNTIME_PREFIX = "skipcat.";

const char * skipcat_runtime_version(void) {
    return "skipcat." SKIPCAT_STR(SKIPCAT_RUNTIME_REVISION);
}

int32_t skipcat_format_version(void) {
    return SKIPCAT_FORMAT_VERSION;
}

bool skipcat_starts_with(const std::string & s, const char * prefix) {
    return s.compare(0, strlen(prefix), prefix) == 0;
}

static bool ends_with(const std::string & s, const char * suffix) {
    const size_t n = strlen(suffix);
    return s.size() >= n && s.compare(s.size() - n, n, suffix) == 0;
}

std::string skipcat_base_arch(const std::string & name) {
    return skipcat_starts_with(name, SKIPCAT_ARCH_PREFIX) ? name.substr(strlen(SKIPCAT_ARCH_PREFIX)) : name;
}

//
// opening
//

bool skipcat_is_factor(const std::string & name) {
    return name.find(".lr_a") != std::string::npos || name.find(".lr_b") != std::string::npos ||
           name.find(".skip_mask") != std::string::npos;
}

// N of "skipcat.N", 0 for anything else; strtol alone would take spaces, signs and words
static long parse_runtime(const std::string & s) {
    if (!skipcat_starts_with(s, SKIPCAT_RUNTIME_PREFIX)) {
        return 0;
    }
    const std::string digits = s.substr(strlen(SKIPCAT_RUNTIME_PREFIX));
    return digits.find_first_not_of("0123456789") == std::string::npos ? strtol(digits.c_str(), nullptr, 10) : 0;
}

// the file's format version
static uint32_t check_versions(const gguf_context * meta) {
    const int64_t version_id = gguf_find_key(meta, "skipcat.format_version");
    if (version_id < 0 || gguf_get_kv_type(meta, version_id) != GGUF_TYPE_UINT32) {
        throw std::runtime_error("key 'skipcat.format_version' is missing or not a u32");
    }
    const uint32_t version = gguf_get_val_u32(meta, version_id);
    if (version < 1 || version > SKIPCAT_FORMAT_VERSION) {
        throw std::runtime_error(format("skipcat.format_version is %u, but this runtime (%s) reads up to %d",
                version, skipcat_runtime_version(), SKIPCAT_FORMAT_VERSION));
    }

    const int64_t runtime_id = gguf_find_key(meta, "skipcat.runtime_min");
    if (runtime_id < 0 || gguf_get_kv_type(meta, runtime_id) != GGUF_TYPE_STRING) {
        throw std::runtime_error("key 'skipcat.runtime_min' is missing or not a string");
    }
    const std::string runtime = gguf_get_val_str(meta, runtime_id);
    const long revision = parse_runtime(runtime);
    if (revision < 1) {
        throw std::runtime_error("key 'skipcat.runtime_min' is not of the form 'skipcat.N'");
    }
    if (revision > SKIPCAT_RUNTIME_REVISION) {
        throw std::runtime_error(format("skipcat.runtime_min is %s, but this runtime is %s", runtime.c_str(), skipcat_runtime_version()));
    }

    return version;
}

static std::vector<float> read_levels(const gguf_context * meta, uint32_t version) {
    const int64_t levels_id = gguf_find_key(meta, "skipcat.levels");
    if (version == 1) {
        if (levels_id >= 0) {
            throw std::runtime_error("key 'skipcat.levels' is in a file of skipcat.format_version 1, which has no levels");
        }
        const int64_t ratio_id = gguf_find_key(meta, "skipcat.ratio");
        const bool has_ratio = ratio_id >= 0 && gguf_get_kv_type(meta, ratio_id) == GGUF_TYPE_FLOAT32;
        const float ratio = has_ratio ? gguf_get_val_f32(meta, ratio_id) : 1.0f;
        if (!(std::isfinite(ratio) && ratio > 0.0f)) {
            throw std::runtime_error(format("key 'skipcat.ratio' is %g, but a ratio is above 0", ratio));
        }
        return { ratio };
    }

    if (levels_id < 0 || gguf_get_kv_type(meta, levels_id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta, levels_id) != GGUF_TYPE_FLOAT32) {
        throw std::runtime_error("key 'skipcat.levels' is missing or not an array of f32");
    }
    const size_t n_levels = gguf_get_arr_n(meta, levels_id);
    if (n_levels < 2 || n_levels > SKIPCAT_MAX_LEVELS) {
        throw std::runtime_error(format("key 'skipcat.levels' has %zu values, but a file has 2 to %d levels", n_levels, SKIPCAT_MAX_LEVELS));
    }
    const float * ratios = (const float *) gguf_get_arr_data(meta, levels_id);
    float below = 0.0f;
    for (size_t i = 0; i < n_levels; i++) {
        // written so that it refuses NaN as well
        if (!(ratios[i] > below && ratios[i] <= 1.0f)) {
            throw std::runtime_error("key 'skipcat.levels' does not rise between 0 and 1");
        }
        below = ratios[i];
    }
    return { ratios, ratios + n_levels };
}

static bool has_factor_name(const std::string & name, const std::vector<skipcat_range> & ranges) {
    if (!skipcat_starts_with(name, "blk.")) {
        return false;
    }
    for (const auto & range : ranges) {
        if (ends_with(name, (".lr_a" + range.infix + ".weight").c_str()) || ends_with(name, (".lr_b" + range.infix + ".weight").c_str()) ||
                ends_with(name, (".skip_mask" + range.infix).c_str())) {
            return true;
        }
    }
    return false;
}

std::shared_ptr<skipcat_model> skipcat_open(const llama_model_loader & ml) {
    if (!skipcat_starts_with(ml.get_arch_name(), SKIPCAT_ARCH_PREFIX)) {
        return nullptr;
    }

    auto model = std::make_shared<skipcat_model>();

    const uint32_t version = check_versions(ml.metadata);
    model->levels = read_levels(ml.metadata, version);

    const int32_t n_levels = (int32_t) model->levels.size();
    for (int32_t first = 0; first < n_levels; first++) {
        for (int32_t last = first; last < n_levels; last++) {
            const bool all = first == 0 && last == n_levels - 1;
            model->ranges.push_back({ first, last, all ? "" : format(".%d.%d", first, last) });
        }
    }

    size_t n_factors = 0;
    for (const auto & [name, weight] : ml.weights_map) {
        if (!skipcat_is_factor(name)) {
            continue;
        }
        if (!has_factor_name(name, model->ranges)) {
            throw std::runtime_error(format("tensor '%s' is not a tensor of skipcat.format_version %u with %d level%s",
                    name.c_str(), version, n_levels, n_levels == 1 ? "" : "s"));
        }
        n_factors++;
    }
    skipcat_check_keys(ml);

    ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead()*(n_factors + 1),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };

    model->ctx.reset(ggml_init(params));
    if (!model->ctx) {
        throw std::runtime_error("failed to create ggml context");
    }

    return model;
}

//
// levels
//

int32_t skipcat_n_levels(const llama_model * model) {
    return model->skipcat ? (int32_t) model->skipcat->levels.size() : 1;
}

float skipcat_level_ratio(const llama_model * model, int32_t level) {
    if (level < 0 || level >= skipcat_n_levels(model)) {
        return -1.0f;
    }
    return model->skipcat ? model->skipcat->levels[level] : 1.0f;
}

int32_t skipcat_get_level(const llama_context * ctx) {
    return skipcat_n_levels(&ctx->get_model()) - 1 - ctx->get_cparams().skipcat_below;
}

int32_t skipcat_set_level(llama_context * ctx, int32_t level) {
    const int32_t n_levels = skipcat_n_levels(&ctx->get_model());
    if (level < 0 || level >= n_levels) {
        return -1;
    }
    ctx->get_cparams().skipcat_below = n_levels - 1 - level;
    return 0;
}
