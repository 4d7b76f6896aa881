#pragma once

// What becomes of an RPC server that stops answering: an error of llama_decode, never an abort or a hang.
//
// A server that computes or takes in weights may be silent for minutes, so silence alone means nothing. Ours
// therefore says every second meanwhile that it is alive, in the place of the next response's size, and a client gives
// up on a server that it hears nothing of for five. A killed server is noticed at once, as its socket closes. Once one
// is lost, the others have little time: several may be gone together, and what they say is of no use.

#include "ggml-backend.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#ifdef _WIN32
#  define WIN32_LEAN_AND_MEAN
#  ifndef NOMINMAX
#     define NOMINMAX
#  endif
#  include <winsock2.h>
#  include <ws2tcpip.h>
#else
#  include <netinet/in.h>
#  include <netinet/tcp.h>
#  include <poll.h>
#  include <sys/socket.h>
#  include <sys/time.h>
#endif

static constexpr uint64_t SKIPCAT_RPC_ALIVE   = UINT64_MAX; // no response is this large
static constexpr int      SKIPCAT_RPC_EVERY   = 1;          // seconds
static constexpr int      SKIPCAT_RPC_SILENCE = 5000;       // ms
static constexpr int      SKIPCAT_RPC_OTHERS  = 1500;       // ms that the others have together after a loss
static constexpr int      SKIPCAT_RPC_LOSS    = 3000;       // ms after the latest loss that belong to the same use
static constexpr int      SKIPCAT_RPC_RECV    = 100;        // ms after which a call returns, for its patience to be looked up
static constexpr int      SKIPCAT_RPC_SEND    = 1500;       // the same; it also limits connecting
static constexpr int      SKIPCAT_RPC_HURRY   = 50;         // both, of a connection made after a loss: a stopped server
                                                            // takes two, and to connect once more takes all the time
static constexpr int      SKIPCAT_RPC_UNSENT  = 1 << 18;    // bytes: a slow network sends them in much less

//
// client
//

struct skipcat_rpc_lost {
    using clock = std::chrono::steady_clock;

    std::mutex mutex;
    std::set<std::string> endpoints; // for good: what they held is gone
    std::set<std::string> silent;    // addresses, as the system has them: no new connection to one has a chance
    clock::time_point first  = clock::now() - std::chrono::hours(1); // loss of the latest use
    clock::time_point latest = first;

    static int64_t ms_since(clock::time_point then) {
        return std::chrono::duration_cast<std::chrono::milliseconds>(clock::now() - then).count();
    }

    bool is_recent() const {
        return ms_since(latest) <= SKIPCAT_RPC_LOSS;
    }

    static skipcat_rpc_lost & instance() {
        static skipcat_rpc_lost lost;
        return lost;
    }
};

inline void skipcat_rpc_lose(const std::string & endpoint) {
    skipcat_rpc_lost & lost = skipcat_rpc_lost::instance();
    std::lock_guard<std::mutex> lock(lost.mutex);
    if (lost.endpoints.insert(endpoint).second) {
        const bool is_first = !lost.is_recent();
        lost.latest = skipcat_rpc_lost::clock::now();
        lost.first  = is_first ? lost.latest : lost.first;
    }
    GGML_LOG_ERROR("the RPC server %s was lost\n", endpoint.c_str()); // each time: it is the reason of what fails next
}

// dev: of the RPC backend, whose devices are described by their endpoints
inline bool skipcat_rpc_is_lost(ggml_backend_dev_t dev) {
    skipcat_rpc_lost & lost = skipcat_rpc_lost::instance();
    std::lock_guard<std::mutex> lock(lost.mutex);
    return lost.endpoints.count(ggml_backend_dev_description(dev)) != 0;
}

// of the other end, empty where there is none
template <typename socket_fd>
static std::string skipcat_rpc_address(socket_fd fd) {
    struct sockaddr_storage peer;
    socklen_t size = sizeof(peer);
    return getpeername(fd, (struct sockaddr *) &peer, &size) == 0 ? std::string((const char *) &peer, size) : "";
}

// ms for which a server may go on being silent, after a call that waited for `waited`
template <typename socket_fd>
static int skipcat_rpc_patience(socket_fd fd, int waited) {
    skipcat_rpc_lost & lost = skipcat_rpc_lost::instance();
    std::lock_guard<std::mutex> lock(lost.mutex);
    if (!lost.is_recent()) {
        lost.silent.clear();
        return SKIPCAT_RPC_SILENCE - waited;
    }
    return lost.silent.count(skipcat_rpc_address(fd)) != 0 ? 0 : std::max<int>(0, SKIPCAT_RPC_OTHERS - lost.ms_since(lost.first));
}

// what stands for the response of a server that gives none: no memory, no devices, nothing done;
// a single number is an alignment, an address or a size, which ggml stops at if it is 0
inline void skipcat_rpc_no_answer(void * output, size_t size) {
    memset(output, 0, size);
    if (size == sizeof(uint64_t)) {
        const uint64_t number = 64;
        memcpy(output, &number, sizeof(number));
    }
}

template <typename socket_fd>
static void skipcat_rpc_set_option(socket_fd fd, int level, int name, int value) {
    setsockopt(fd, level, name, (const char *) &value, sizeof(value));
}

#ifndef _WIN32
// ms after which a call returns; name: SO_RCVTIMEO or SO_SNDTIMEO
template <typename socket_fd>
static void skipcat_rpc_set_timeout(socket_fd fd, int name, int ms) {
    const struct timeval timeout = { ms/1000, ms%1000*1000 };
    setsockopt(fd, SOL_SOCKET, name, &timeout, sizeof(timeout));
}

template <typename socket_fd>
static int skipcat_rpc_timeout(socket_fd fd, int name) {
    struct timeval timeout = {};
    socklen_t size = sizeof(timeout);
    return getsockopt(fd, SOL_SOCKET, name, &timeout, &size) == 0 ? int(timeout.tv_sec*1000 + timeout.tv_usec/1000) : 0;
}
#endif

// of a socket that is accepted (a client may be idle, but one whose machine is gone must not keep the server from the
// next one) or about to be connected
template <typename socket_fd>
static void skipcat_rpc_limit_silence(socket_fd fd) {
    if (!skipcat_rpc_address(fd).empty()) {
        skipcat_rpc_set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
#ifdef TCP_KEEPIDLE
        skipcat_rpc_set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE,  10);
        skipcat_rpc_set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 5);
        skipcat_rpc_set_option(fd, IPPROTO_TCP, TCP_KEEPCNT,   4);
#endif
#ifdef TCP_USER_TIMEOUT // where a sign of life waits to be received, nothing is asked to keep the connection
        skipcat_rpc_set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 30*1000);
#endif
        return;
    }
    skipcat_rpc_set_option(fd, SOL_SOCKET, SO_SNDBUF, SKIPCAT_RPC_UNSENT);
#ifdef _WIN32
    skipcat_rpc_set_option(fd, SOL_SOCKET, SO_RCVTIMEO, SKIPCAT_RPC_SILENCE);
    skipcat_rpc_set_option(fd, SOL_SOCKET, SO_SNDTIMEO, SKIPCAT_RPC_SILENCE);
#else
    skipcat_rpc_lost & lost = skipcat_rpc_lost::instance();
    std::lock_guard<std::mutex> lock(lost.mutex);
    skipcat_rpc_set_timeout(fd, SO_RCVTIMEO, lost.is_recent() ? SKIPCAT_RPC_HURRY : SKIPCAT_RPC_RECV);
    skipcat_rpc_set_timeout(fd, SO_SNDTIMEO, lost.is_recent() ? SKIPCAT_RPC_HURRY : SKIPCAT_RPC_SEND);
#endif
}

// nothing can be sent or received any more, and so no later call waits
template <typename socket_fd>
static void skipcat_rpc_close(socket_fd fd) {
#ifdef _WIN32
    shutdown(fd, SD_BOTH);
#else
    shutdown(fd, SHUT_RDWR);
#endif
}

// the signs of life that stand first among n bytes, as a server sends them whole
inline size_t skipcat_rpc_count_alive(const uint64_t * said, size_t n) {
    size_t i = 0;
    while (i < n/sizeof(said[0]) && said[i] == SKIPCAT_RPC_ALIVE) {
        i++;
    }
    return i;
}

#ifndef _WIN32
// waits until there is room to send or something to receive, for `patience` ms at most. A server that computes takes no
// data, but says that it is alive: a sender takes that in, and nothing else; a receiver reads it itself.
template <typename socket_fd>
static bool skipcat_rpc_wait(socket_fd fd, bool sends, int patience) {
    const auto end = skipcat_rpc_lost::clock::now() + std::chrono::milliseconds(patience);
    while (true) {
        uint64_t said[64];
        const ssize_t n = recv(fd, said, sizeof(said), MSG_PEEK | MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)) {
            return false;
        }
        const size_t alive = n > 0 ? skipcat_rpc_count_alive(said, n)*sizeof(said[0]) : 0;
        if (sends ? alive > 0 && recv(fd, said, alive, MSG_DONTWAIT) == ssize_t(alive) : n > 0) {
            return true;
        }
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - skipcat_rpc_lost::clock::now()).count();
        if (left <= 0) {
            return false;
        }
        // a response is not for a sender, and would wake it at once
        struct pollfd event = { fd, short((sends ? POLLOUT : 0) | (n > 0 ? 0 : POLLIN)), 0 };
        if (poll(&event, 1, int(left)) > 0 && sends && (event.revents & (POLLOUT | POLLERR | POLLHUP))) {
            return !(event.revents & (POLLERR | POLLHUP));
        }
    }
}
#endif

// after send or recv failed: whether to try again
template <typename socket_fd>
static bool skipcat_rpc_try_again(socket_fd fd, bool sends) {
#ifndef _WIN32
    if (errno == EINTR) { // a call with a time limit is not restarted after a signal
        return true;
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK) {
        const int waited = skipcat_rpc_timeout(fd, sends ? SO_SNDTIMEO : SO_RCVTIMEO);
        if (skipcat_rpc_wait(fd, sends, skipcat_rpc_patience(fd, waited))) {
            return true;
        }
        skipcat_rpc_lost & lost = skipcat_rpc_lost::instance();
        std::lock_guard<std::mutex> lock(lost.mutex);
        lost.silent.insert(skipcat_rpc_address(fd));
    }
#endif
    skipcat_rpc_close(fd);
    return false;
}

//
// server
//

// as long as it exists, the client hears that the server is alive; only for a command without a response, as nothing
// else may send meanwhile
template <typename socket_ptr>
class skipcat_rpc_alive {
  public:
    skipcat_rpc_alive(socket_ptr sock, bool wanted) {
        if (wanted) {
            thread = std::thread([this, sock] { say(*sock); });
        }
    }

    ~skipcat_rpc_alive() {
        if (!thread.joinable()) {
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex);
            done = true;
        }
        changed.notify_one();
        thread.join();
    }

  private:
    template <typename socket>
    void say(socket & sock) {
        const uint64_t alive = SKIPCAT_RPC_ALIVE;
        std::unique_lock<std::mutex> lock(mutex);
        while (!changed.wait_for(lock, std::chrono::seconds(SKIPCAT_RPC_EVERY), [this] { return done; })) {
            if (!sock.send_data(&alive, sizeof(alive)) || !sock.flush()) {
                return;
            }
        }
    }

    std::mutex              mutex;
    std::condition_variable changed;
    bool                    done = false;
    std::thread             thread;
};
