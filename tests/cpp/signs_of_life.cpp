// What a socket does with signs of life and with a response after a call on it timed out: prints the bytes that are left
// to be read, for a sender and for a receiver, each with whether it tries again. Then the same for a sender that finds
// room meanwhile, and how long others may be silent before and after a loss.

#include "skipcat-servers.h"

#include <cstdio>
#include <unistd.h>

extern "C" void ggml_log_internal(ggml_log_level, const char *, ...) {
} // nothing of ggml is linked

static constexpr int PATIENCE = 100; // ms

static void try_with(bool sends, const uint64_t * said, size_t n, bool has_room = false) {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0 || (n > 0 && write(ends[1], said, n*sizeof(*said)) < 0)) {
        return;
    }
    const char full[4096] = {};
    while (!has_room && send(ends[0], full, sizeof(full), MSG_DONTWAIT) > 0) {
    }
    const bool again = skipcat_rpc_wait(ends[0], sends, PATIENCE);

    uint64_t left[8];
    const ssize_t n_left = recv(ends[0], left, sizeof(left), MSG_DONTWAIT);
    printf("%s %zd\n", again ? "again" : "lost", n_left > 0 ? n_left : 0);
    close(ends[0]);
    close(ends[1]);
}

int main() {
    const uint64_t said[] = { SKIPCAT_RPC_ALIVE, SKIPCAT_RPC_ALIVE, 4, 7 };
    for (const bool sends : { true, false }) {
        try_with(sends, said, 0);     // silence
        try_with(sends, said, 2);     // signs of life
        try_with(sends, said, 4);     // and a response
        try_with(sends, said + 2, 2); // a response only
    }
    try_with(true, said, 0, true);
    printf("%d\n", skipcat_rpc_patience(-1, SKIPCAT_RPC_RECV) + SKIPCAT_RPC_RECV);
    skipcat_rpc_lose("one");
    usleep(20*1000);
    printf("%s\n", skipcat_rpc_patience(-1, SKIPCAT_RPC_RECV) < SKIPCAT_RPC_OTHERS ? "less" : "as much");
}
