// Replays one case (registers, slots, memory image, ops) through KVM and prints, for every op, its outcome and which KVM statistics it moved.
// Layout of the guest's two pages: stubs.inc. Layout of the input: struct head, slots, pages, ops (wire.py writes it and reads the output).
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#define CHECK(x) ({ long r_ = (x); if (r_ < 0) fail(#x); r_; })
#define RT 0x7000ull
#define MAGIC 0x344b4853ull
#define MAX_MMIO 24 // more MMIO exits than this in one op: a guest that repeats for ever
#define MAX_STATS 128
#define HUGE (2ull << 20)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

// The reader of this program's output looks for "ERROR " and for "DONE".
static void fail(const char *what) { printf("ERROR %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : ""); exit(1); }

// Where things are in the code of one mode (64-bit, 32-bit): HLTs at the ends of runs, the way to CPL 3, tables.
struct mode { uint64_t back, pf, gp, df, bp, user, idt, idt_limit, tss, idtr, cs; };
struct head {
	uint64_t magic, memory, backing, cr0, cr3, cr4, efer, vcpus, slots, pages, ops, huge, huge_end, phys_bits, manual, gdt, gdt_limit;
	struct mode mode[2];
};
struct slot { uint64_t id, gpa, size, flags; };
struct op { uint8_t op, size, cpl, vcpu; uint32_t arg, rip, end, flags, length; uint64_t addr, value, expected; };
enum { GUEST, FETCH, READ, WRMSR, CMPXCHG8B, RUN, INT3, LIDT, SSE, CMPXCHG16B, HWRITE = 16, SLOT, DIRTYLOG, UNMAP, QUOTA, CLEARDIRTY, HREAD, SREGS, STACK, SLOT_ADD };
enum { DONE, PAGE_FAULT, MMIO, GP, STOPPED, DOUBLE_FAULT, SHUTDOWN };
#define AC 2 // op.flags

struct stat_def { char name[64]; uint64_t off; };
struct stats { struct stat_def def[MAX_STATS]; int n; };
struct result { int status, mmios; uint64_t err, value, addr; struct { uint64_t gpa; int len, write; } mmio[MAX_MMIO]; };

static struct head head;
static uint8_t *ram;
static int kvm, vm, vcpu[8], vmstat, vcstat[8], dead[8];
static uint64_t stack[8], home[256]; // top of the supervisor stack; where a slot's memory is
static struct kvm_run *run[8];
static struct stats vmdef, vcdef;
static volatile int timed_out;

static void on_alarm(int sig) { (void)sig; timed_out = 1; for (unsigned c = 0; c < head.vcpus; c++) run[c]->immediate_exit = 1; }

static int load_stats(int fd, struct stats *d)
{
	int s = CHECK(ioctl(fd, KVM_GET_STATS_FD, 0));
	struct kvm_stats_header sh;
	CHECK(pread(s, &sh, sizeof sh, 0));
	size_t size = sizeof(struct kvm_stats_desc) + sh.name_size;
	d->n = 0;
	for (unsigned i = 0; i < sh.num_desc; i++) {
		char b[512] __attribute__((aligned(8)));
		struct kvm_stats_desc *k = (void *)b;
		CHECK(pread(s, b, size, sh.desc_offset + i * size));
		if (k->size != 1) continue; // histograms
		snprintf(d->def[d->n].name, sizeof d->def[0].name, "%.63s", k->name);
		d->def[d->n++].off = sh.data_offset + k->offset;
	}
	return s;
}

static void read_stats(int fd, const struct stats *d, uint64_t *v)
{
	static uint8_t buf[16384];
	ssize_t got = CHECK(pread(fd, buf, sizeof buf, 0));
	for (int i = 0; i < d->n; i++) {
		v[i] = 0;
		if (d->def[i].off + 8 <= (size_t)got) memcpy(&v[i], buf + d->def[i].off, 8);
	}
}

static void print_changes(const struct stats *d, const uint64_t *before, const uint64_t *after)
{
	for (int i = 0; i < d->n; i++)
		if (after[i] != before[i]) printf(" %s%+lld", d->def[i].name, (long long)(after[i] - before[i]));
}

static void put(const char *path, const char *text)
{
	int f = open(path, O_WRONLY);
	if (f < 0 || write(f, text, strlen(text)) < 0) perror(path);
	if (f >= 0) close(f);
}

// A slot's memory is that at its first address; it stays when the slot moves.
static void set_slot(int id, uint64_t gpa, uint64_t size, uint32_t flags)
{
	struct kvm_userspace_memory_region r = { id, flags, gpa, size, (uintptr_t)ram + home[id] };
	CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r));
}

static void add_slot(int id, uint64_t gpa, uint64_t size, uint32_t flags) { home[id] = gpa; set_slot(id, gpa, size, flags); }

static void set_msr(int fd, uint32_t index, uint64_t value)
{
	struct { struct kvm_msrs m; struct kvm_msr_entry e; } x = { .m.nmsrs = 1, .e = { .index = index, .data = value } };
	CHECK(ioctl(fd, KVM_SET_MSRS, &x));
}

static struct kvm_segment segment(int selector, int type, int l)
{
	return (struct kvm_segment){ .limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .s = 1, .l = l, .db = !l, .g = 1, .dpl = selector & 3 };
}

static void read_exact(void *p, size_t n, FILE *f) { if (fread(p, 1, n, f) != n) fail("the case is cut short"); }

// Host pages of 2 MiB for that range of guest memory; without them the recording would be another case.
static void make_huge(void)
{
	char line[256];
	unsigned long kb, got = 0, want = (head.huge_end - head.huge) >> 10;
	madvise(ram + head.huge, head.huge_end - head.huge, MADV_HUGEPAGE);
	for (uint64_t i = head.huge; i < head.huge_end; i += HUGE) *(volatile uint8_t *)(ram + i) = 0; // a read first would give the huge zero page
	FILE *f = fopen("/proc/self/smaps", "r");
	while (f && fgets(line, sizeof line, f)) if (sscanf(line, "AnonHugePages: %lu", &kb) == 1) got += kb;
	if (f) fclose(f);
	if (got != want) fail("the host has not given the pages of 2 MiB");
}

// Guest memory as far as it is there from the start: every host page of it is touched, so that only KVM's own faults count.
static void load_memory(FILE *f)
{
	ram = mmap(0, head.backing + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (ram == MAP_FAILED) fail("mmap");
	ram += -(uintptr_t)ram & (HUGE - 1);
	madvise(ram, head.backing, MADV_NOHUGEPAGE);
	if (head.huge_end > head.huge) make_huge();
	for (uint64_t i = 0; i < head.slots; i++) {
		struct slot s;
		read_exact(&s, sizeof s, f);
		add_slot(s.id, s.gpa, s.size, s.flags);
	}
	for (uint64_t i = 0; i < head.pages; i++) {
		uint64_t gpa;
		read_exact(&gpa, 8, f);
		read_exact(ram + gpa, 4096, f);
	}
	if (madvise(ram, head.memory, MADV_POPULATE_WRITE)) // a kernel before 5.14
		for (uint64_t i = 0; i < head.memory; i += 4096) *(volatile uint8_t *)(ram + i) |= 0;
}

static const struct mode *mode_of(uint64_t efer) { return &head.mode[!(efer & 1 << 10)]; }

// Control registers, and with them the segments and the IDT of the mode.
static void set_sregs(int c, uint64_t cr0, uint64_t cr3, uint64_t cr4, uint64_t efer)
{
	const struct mode *m = mode_of(efer);
	int wide = m == head.mode;
	struct kvm_sregs r;
	CHECK(ioctl(vcpu[c], KVM_GET_SREGS, &r));
	r.cr0 = cr0; r.cr3 = cr3; r.cr4 = cr4; r.efer = efer;
	r.cs = segment(m->cs, 11, wide);
	r.ss = segment(0x10, 3, 0);
	r.ds = r.es = r.fs = r.gs = segment(0x1b, 3, 0); // IRET to CPL 3 keeps those that CPL 3 may use
	r.gdt.base = head.gdt; r.gdt.limit = head.gdt_limit;
	r.idt.base = m->idt; r.idt.limit = m->idt_limit;
	r.tr = (struct kvm_segment){ .base = m->tss, .limit = 0x67, .selector = 0x28, .type = wide ? 11 : 9, .present = 1 }; // TCG aborts on a busy 32-bit TSS
	CHECK(ioctl(vcpu[c], KVM_SET_SREGS, &r));
	if (dead[c]) { // forget what was being delivered
		struct kvm_vcpu_events none = { 0 };
		CHECK(ioctl(vcpu[c], KVM_SET_VCPU_EVENTS, &none));
		dead[c] = 0;
	}
	struct kvm_mp_state runnable = { KVM_MP_STATE_RUNNABLE };
	ioctl(vcpu[c], KVM_SET_MP_STATE, &runnable);
}

static void make_vcpu(unsigned c, const void *cpuid)
{
	vcpu[c] = CHECK(ioctl(vm, KVM_CREATE_VCPU, c));
	run[c] = mmap(0, CHECK(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu[c], 0);
	CHECK(ioctl(vcpu[c], KVM_SET_CPUID2, cpuid));
	vcstat[c] = load_stats(vcpu[c], &vcdef);
	stack[c] = RT + 0xfe0;
	set_sregs(c, head.cr0, head.cr3, head.cr4, head.efer);
	set_msr(vcpu[c], 0xc0000081, 8ull << 32 | 0x10ull << 48); // STAR
	set_msr(vcpu[c], 0xc0000082, head.mode[0].back);          // LSTAR
	set_msr(vcpu[c], 0xc0000084, 0);
}

// Was the way out the expected one? If not, the guest ran something that is not its stub (a stale or damaged page) and the case is worthless from here on.
static int tame(const struct op *o, const struct mode *m, const struct kvm_regs *g, uint64_t cr2)
{
	int jump = o->op == FETCH || o->op == RUN;
	uint64_t hlt = g->rip - 1, end = o->op == FETCH ? o->addr : o->op == RUN ? o->addr + o->length : o->end;
	if (hlt == m->df) return 1;
	if (hlt == m->bp) return o->op == INT3 && g->rcx == o->rip + 1;
	if (hlt == m->pf && o->op == FETCH) return g->rcx == o->rip || cr2 == o->addr;
	if (hlt == m->pf || hlt == m->gp) return g->rcx == o->rip || (o->op == RUN && g->rcx >= o->addr && g->rcx <= end);
	return jump || o->cpl ? hlt == m->back && g->rcx == end + 2 : hlt == o->end;
}

// Registers and, in guest memory, what the way to the instruction under test reads.
static struct kvm_regs prepare(const struct op *o, const struct mode *m)
{
	int wide = m == head.mode;
	uint64_t rip = o->rip - o->arg, rsp0 = stack[o->vcpu] + 0x10; // a stub may have instructions before the one under test
	struct kvm_regs g = { .rflags = 2 | (o->flags & AC ? 1 << 18 : 0), .rsp = stack[o->vcpu], .rbx = o->addr, .rdi = o->addr, .rsi = o->expected, .rdx = o->value, .rax = o->expected, .rip = rip };
	if (o->op == WRMSR) { g.rcx = 0xc0000080; g.rax = (uint32_t)o->value; g.rdx = o->value >> 32; }
	if (o->op == CMPXCHG8B) { g.rbx = (uint32_t)o->value; g.rsi = o->value >> 32; g.rax = (uint32_t)o->expected; g.rdx = o->expected >> 32; }
	if (o->op == CMPXCHG16B) { g.rbx = o->value; g.rsi = g.rdx = 0; g.rax = o->expected; } // the high halves are zero
	if (o->op == RUN) g.rbx = o->expected;
	if (o->op == LIDT) { memcpy(ram + m->idtr, &(uint16_t){ m->idt_limit }, 2); memcpy(ram + m->idtr + 2, &o->addr, wide ? 8 : 4); }
	if (o->op == SSE) memcpy(ram + RT + 0xd00 + 4096 * !!o->cpl, (uint64_t[]){ o->value, o->expected }, 16);
	memcpy(ram + m->tss + 4, &rsp0, wide ? 8 : 4);
	if (o->length && o->op == GUEST) g.rsp = o->addr + o->length; // PUSH
	if (o->cpl && wide) { g.r11 = g.rflags; g.rcx = rip; g.rip = m->user; g.rflags = 2; }
	if (o->cpl && !wide) {
		uint32_t frame[5] = { rip, 0x33, g.rflags, g.rsp, 0x1b };
		memcpy(ram + RT + 0xf60, frame, sizeof frame);
		g.rsp = RT + 0xf60; g.rip = m->user; g.rflags = 2;
	}
	return g;
}

// Runs the vCPU until it leaves for another reason than MMIO.
static void run_vcpu(int c, struct result *res)
{
	timed_out = 0; run[c]->immediate_exit = 0;
	struct itimerval t = { .it_value.tv_sec = 4 }, off = { 0 };
	setitimer(ITIMER_REAL, &t, 0);
	for (;;) {
		int r = ioctl(vcpu[c], KVM_RUN, 0);
		if (r < 0 && errno == EINTR && !timed_out) continue;
		if (r < 0) { res->status = STOPPED; res->err = 0x1000 + errno; break; }
		if (run[c]->exit_reason != KVM_EXIT_MMIO) break;
		if (res->mmios == MAX_MMIO) { res->status = STOPPED; res->err = 0x2000; break; }
		res->mmio[res->mmios].gpa = run[c]->mmio.phys_addr;
		res->mmio[res->mmios].len = run[c]->mmio.len;
		res->mmio[res->mmios++].write = run[c]->mmio.is_write;
		if (!run[c]->mmio.is_write) memset(run[c]->mmio.data, 0xff, 8);
	}
	setitimer(ITIMER_REAL, &off, 0);
}

static void enter(const struct op *o, struct result *res)
{
	int c = o->vcpu;
	struct kvm_sregs r;
	if (dead[c]) { res->status = STOPPED; res->err = 0x4000; return; }
	CHECK(ioctl(vcpu[c], KVM_GET_SREGS, &r));
	const struct mode *m = mode_of(r.efer);
	struct kvm_regs g = prepare(o, m);
	CHECK(ioctl(vcpu[c], KVM_SET_REGS, &g));
	run_vcpu(c, res);
	if (res->status == STOPPED) return;
	if (run[c]->exit_reason == KVM_EXIT_SHUTDOWN) { res->status = SHUTDOWN; dead[c] = 1; return; }
	if (run[c]->exit_reason != KVM_EXIT_HLT) { res->status = STOPPED; res->err = run[c]->exit_reason; return; }
	CHECK(ioctl(vcpu[c], KVM_GET_REGS, &g));
	CHECK(ioctl(vcpu[c], KVM_GET_SREGS, &r));
	uint64_t hlt = g.rip - 1;
	if (!tame(o, m, &g, r.cr2)) { res->status = STOPPED; res->err = 0x3000; res->addr = g.rip; return; }
	if (hlt == m->pf) { res->status = PAGE_FAULT; res->err = g.rax; res->addr = r.cr2; }
	else if (hlt == m->gp) { res->status = GP; res->err = g.rax; }
	else if (hlt == m->df) res->status = DOUBLE_FAULT;
	else if (res->mmios) { res->status = MMIO; res->addr = res->mmio[0].gpa; res->err = res->mmio[res->mmios - 1].write; }
	if (o->op == READ && hlt != m->pf && hlt != m->df) res->value = g.rdx & (o->size == 8 ? ~0ull : (1ull << 8 * o->size) - 1);
}

static void host(const struct op *o, struct result *res)
{
	static uint8_t bitmap[1 << 17];
	switch (o->op) {
	case HWRITE: memcpy(ram + o->addr, &o->value, o->size); break;
	case SLOT_ADD: add_slot(o->size, o->addr, o->value, o->arg); break;
	case SLOT: set_slot(o->size, o->addr, o->value, o->arg); break;
	case UNMAP: CHECK(madvise(ram + o->addr, o->value, MADV_DONTNEED)); break;
	case QUOTA: CHECK(ioctl(vm, KVM_SET_NR_MMU_PAGES, o->value)); break;
	case DIRTYLOG: {
		struct kvm_dirty_log d = { .slot = o->size, .dirty_bitmap = bitmap };
		memset(bitmap, 0, sizeof bitmap);
		CHECK(ioctl(vm, KVM_GET_DIRTY_LOG, &d));
		for (unsigned b = 0; b < sizeof bitmap; b++) res->value += __builtin_popcount(bitmap[b]);
		break;
	}
	case CLEARDIRTY: {
		uint64_t *words = (void *)bitmap;
		struct kvm_clear_dirty_log d = { .slot = o->size, .first_page = o->addr, .num_pages = o->value, .dirty_bitmap = bitmap };
		for (uint64_t w = 0; w < (o->value + 63) / 64; w++) words[w] = o->expected;
		CHECK(ioctl(vm, KVM_CLEAR_DIRTY_LOG, &d));
		break;
	}
	case HREAD:
		for (uint64_t i = 0; i < o->value; i += 4096) (void)*(volatile uint8_t *)(ram + o->addr + i);
		break;
	case SREGS: set_sregs(o->vcpu, o->value, o->addr, o->expected, o->flags); break;
	case STACK: stack[o->vcpu] = o->addr; break;
	default: fail("unknown host action");
	}
}

int main(int argc, char **argv)
{
	FILE *f = argc > 1 ? fopen(argv[1], "rb") : 0;
	if (!f) fail("no case");
	int trace = argc > 2;
	read_exact(&head, sizeof head, f);
	if (head.magic != MAGIC) fail("no case of this version");
	signal(SIGALRM, on_alarm);
	kvm = CHECK(open("/dev/kvm", O_RDWR));
	vm = CHECK(ioctl(kvm, KVM_CREATE_VM, 0));
	struct kvm_enable_cap manual = { .cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = { head.manual } };
	if (head.manual) CHECK(ioctl(vm, KVM_ENABLE_CAP, &manual));
	load_memory(f);
	static struct { struct kvm_cpuid2 c; struct kvm_cpuid_entry2 e[128]; } cpuid = { .c.nent = 128 };
	CHECK(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
	for (unsigned i = 0; head.phys_bits && i < cpuid.c.nent; i++)
		if (cpuid.e[i].function == 0x80000008) cpuid.e[i].eax = (cpuid.e[i].eax & ~0xffu) | (uint32_t)head.phys_bits;
	vmstat = load_stats(vm, &vmdef);
	for (unsigned c = 0; c < head.vcpus; c++) make_vcpu(c, &cpuid);
	int mark = -1;
	if (trace) {
		put("/sys/kernel/tracing/buffer_size_kb", "65536");
		put("/sys/kernel/tracing/events/kvmmmu/enable", "1");
		static const char *const more[] = { "kvm_page_fault", "kvm_exit", "kvm_emulate_insn", "kvm_inj_exception", "kvm_mmio", "vcpu_match_mmio", "kvm_unmap_hva_range" };
		for (unsigned i = 0; i < sizeof more / sizeof *more; i++) { char p[128]; snprintf(p, sizeof p, "/sys/kernel/tracing/events/kvm/%s/enable", more[i]); put(p, "1"); }
		put("/sys/kernel/tracing/tracing_on", "1");
		mark = open("/sys/kernel/tracing/trace_marker", O_WRONLY);
	}
	for (uint64_t i = 0; i < head.ops; i++) {
		struct op o;
		struct result res = { 0 };
		uint64_t before[2][MAX_STATS], after[2][MAX_STATS];
		read_exact(&o, sizeof o, f);
		if (mark >= 0) dprintf(mark, "op %llu", (unsigned long long)i);
		read_stats(vmstat, &vmdef, before[0]); read_stats(vcstat[o.vcpu], &vcdef, before[1]);
		if (o.op < HWRITE) enter(&o, &res); else host(&o, &res);
		read_stats(vmstat, &vmdef, after[0]); read_stats(vcstat[o.vcpu], &vcdef, after[1]);
		printf("R %llu %d %llx %llx %llx", (unsigned long long)i, res.status, (unsigned long long)res.err, (unsigned long long)res.value, (unsigned long long)res.addr);
		for (int j = 0; j < res.mmios; j++) printf(" mmio:%llx:%d:%d", (unsigned long long)res.mmio[j].gpa, res.mmio[j].len, res.mmio[j].write);
		print_changes(&vmdef, before[0], after[0]);
		print_changes(&vcdef, before[1], after[1]);
		puts("");
		if (res.status == STOPPED) break;
	}
	if (trace) put("/sys/kernel/tracing/tracing_on", "0");
	puts("DONE");
	return 0;
}
