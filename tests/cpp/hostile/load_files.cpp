// Loads the files whose paths come on standard input, one a line. Says on standard output, a line each:
//
//   start PATH
//   done  loaded|refused  BYTES  MESSAGE
//
// BYTES is the most that was allocated at one time, 0 without AddressSanitizer. A file that takes more than CPU_SECONDS ends
// the process by a signal, as a crash does; who started it goes on with the next file.

#include "load_model.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <string>

#include <sys/time.h>

#if defined(__SANITIZE_ADDRESS__)
#define COUNTS_BYTES
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define COUNTS_BYTES
#endif
#endif

static constexpr int CPU_SECONDS = 5; // of this process: other work on the machine does not count

static int64_t live_bytes = 0;
static int64_t most_bytes = 0;

#ifdef COUNTS_BYTES

// GCC's package has the functions, but not always the header that declares them
extern "C" int    __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void *, size_t), void (*)(const volatile void *));
extern "C" size_t __sanitizer_get_allocated_size(const volatile void *);

// one thread: contexts are made with n_threads 1
static void on_malloc(const volatile void *, size_t size) {
    __atomic_add_fetch(&live_bytes, (int64_t) size, __ATOMIC_RELAXED);
    most_bytes = std::max(most_bytes, live_bytes);
}

static void on_free(const volatile void * p) {
    if (p != nullptr) {
        __atomic_sub_fetch(&live_bytes, (int64_t) __sanitizer_get_allocated_size(p), __ATOMIC_RELAXED);
    }
}

static void count_bytes() {
    __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
}

#else

static void count_bytes() {}

#endif

static void limit_time(int seconds) {
    itimerval timer = {};
    timer.it_value.tv_sec = seconds;
    setitimer(ITIMER_PROF, &timer, nullptr);
}

int main() {
    llama_backend_init();
    count_bytes();

    std::string path;
    while (std::getline(std::cin, path)) {
        printf("start %s\n", path.c_str());
        fflush(stdout);

        const int64_t before = most_bytes = live_bytes;
        limit_time(CPU_SECONDS);
        verdict result = load_model(path.c_str(), std::hash<std::string>()(path) % 2 == 0);
        limit_time(0);

        std::replace(result.message.begin(), result.message.end(), '\n', ' ');
        printf("done %s %lld %s\n", result.loaded ? "loaded" : "refused", (long long) (most_bytes - before), result.message.c_str());
        fflush(stdout);
    }
    return 0;
}
