// A plugin for qemu's emulator of programs: prints how many instructions the program executed.
//
// Each translated block adds its length to the counter when it is entered, so a block that is left early by a
// fault counts whole. Threads would need a counter each: the program must have one.
// The few declarations are those of qemu's plugin interface, whose header Debian does not package.

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;

enum { QEMU_PLUGIN_CB_NO_REGS = 0 };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb * tb);
void   qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*callback)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void   qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb * tb, void (*callback)(unsigned, void *), int flags, void * data);
void   qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*callback)(qemu_plugin_id_t, void *), void * data);

EXPORT int qemu_plugin_version = PLUGIN_VERSION;

static uint64_t n_executed = 0;

static void enter_block(unsigned cpu, void * n_instructions) {
    (void) cpu;
    n_executed += (uintptr_t) n_instructions;
}

static void translate_block(qemu_plugin_id_t id, struct qemu_plugin_tb * tb) {
    (void) id;
    qemu_plugin_register_vcpu_tb_exec_cb(tb, enter_block, QEMU_PLUGIN_CB_NO_REGS, (void *) (uintptr_t) qemu_plugin_tb_n_insns(tb));
}

static void report(qemu_plugin_id_t id, void * data) {
    (void) id;
    (void) data;
    fprintf(stderr, "instructions: %" PRIu64 "\n", n_executed);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void * info, int argc, char ** argv) {
    (void) info;
    (void) argc;
    (void) argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translate_block);
    qemu_plugin_register_atexit_cb(id, report, NULL);
    return 0;
}
