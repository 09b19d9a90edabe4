// Replays one case (registers, slots, memory image, ops) through KVM and prints, for every op, its outcome and which KVM statistics it moved.
// Layout of the guest's two pages: guest.S. Layout of the input: struct head, slots, pages, ops (wire.py writes it and reads the output).
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
#define MAGIC 0x334b4853ull
#define MAX_MMIO 24 // more MMIO exits than this in one op: a guest that repeats for ever
#define MAX_STATS 128
#define HUGE (2ull << 20)

// The reader of this program's output looks for "ERROR " and for "DONE".
static void fail(const char *what) { printf("ERROR %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : ""); exit(1); }

struct head { uint64_t magic, memory, backing, cr0, cr3, cr4, efer, vcpus, slots, pages, ops, pf_entry, gp_entry, sysret, huge, huge_end, phys_bits; };
struct slot { uint64_t id, gpa, size, flags; };
struct op { uint8_t op, size, cpl, vcpu; uint32_t arg, rip, end; uint64_t addr, value, expected; };
enum { GUEST, FETCH, READ, WRMSR, HWRITE = 16, SLOT, DIRTYLOG, UNMAP, QUOTA };
enum { DONE, PAGE_FAULT, MMIO, GP, STOPPED };

struct stat_def { char name[64]; uint64_t off; };
struct stats { struct stat_def def[MAX_STATS]; int n; };
struct result { int status, mmios; uint64_t err, value, addr; struct { uint64_t gpa; int len, write; } mmio[MAX_MMIO]; };

static struct head head;
static uint8_t *ram;
static int kvm, vm, vcpu[8], vmstat, vcstat[8];
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

static void set_slot(int id, uint64_t gpa, uint64_t size, uint32_t flags)
{
	struct kvm_userspace_memory_region r = { id, flags, gpa, size, (uintptr_t)ram + gpa };
	CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r));
}

static void set_msr(int fd, uint32_t index, uint64_t value)
{
	struct { struct kvm_msrs m; struct kvm_msr_entry e; } x = { .m.nmsrs = 1, .e = { .index = index, .data = value } };
	CHECK(ioctl(fd, KVM_SET_MSRS, &x));
}

static struct kvm_segment segment(int selector, int type, int l)
{
	return (struct kvm_segment){ .limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .s = 1, .l = l, .db = !l, .g = 1 };
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
		set_slot(s.id, s.gpa, s.size, s.flags);
	}
	for (uint64_t i = 0; i < head.pages; i++) {
		uint64_t gpa;
		read_exact(&gpa, 8, f);
		read_exact(ram + gpa, 4096, f);
	}
	for (uint64_t i = 0; i < head.memory; i += 4096) *(volatile uint8_t *)(ram + i) |= 0;
}

static void make_vcpu(unsigned c, const void *cpuid)
{
	vcpu[c] = CHECK(ioctl(vm, KVM_CREATE_VCPU, c));
	run[c] = mmap(0, CHECK(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu[c], 0);
	CHECK(ioctl(vcpu[c], KVM_SET_CPUID2, cpuid));
	vcstat[c] = load_stats(vcpu[c], &vcdef);
	struct kvm_sregs r;
	CHECK(ioctl(vcpu[c], KVM_GET_SREGS, &r));
	r.cr0 = head.cr0; r.cr3 = head.cr3; r.cr4 = head.cr4; r.efer = head.efer;
	r.cs = segment(8, 11, 1);
	r.ds = r.es = r.fs = r.gs = r.ss = segment(16, 3, 0);
	r.gdt.base = RT + 0x800; r.gdt.limit = 0x27;
	r.idt.base = RT + 0x900; r.idt.limit = 16 * 16 - 1;
	r.tr = (struct kvm_segment){ .base = RT + 0xa00, .limit = 0x67, .selector = 0x28, .type = 11, .present = 1 };
	CHECK(ioctl(vcpu[c], KVM_SET_SREGS, &r));
	struct kvm_mp_state runnable = { KVM_MP_STATE_RUNNABLE };
	ioctl(vcpu[c], KVM_SET_MP_STATE, &runnable);
	set_msr(vcpu[c], 0xc0000081, 8ull << 32 | 0x10ull << 48); // STAR
	set_msr(vcpu[c], 0xc0000082, RT);                         // LSTAR: the hlt at RT
	set_msr(vcpu[c], 0xc0000084, 0);
}

// Was the way out the expected one? If not, the guest ran something that is not its stub (a stale or damaged page) and the case is worthless from here on.
static int tame(const struct op *o, const struct kvm_regs *g, uint64_t cr2)
{
	const uint64_t *top = (const void *)(ram + RT + (g->rsp & 0xff8));
	if (g->rip == head.pf_entry + 1) return top[1] == o->rip || (o->op == FETCH && top[1] == o->addr && cr2 == o->addr);
	if (g->rip == head.gp_entry + 1) return top[1] == o->rip;
	if (o->op == FETCH) return g->rip == RT + 1 && g->rcx == o->addr + 2;
	return o->cpl ? g->rip == RT + 1 && g->rcx == o->end + 2 : g->rip == o->end + 1;
}

static void enter(const struct op *o, struct result *res)
{
	int c = o->vcpu;
	struct kvm_regs g = { .rflags = 2, .rsp = RT + 0xfe0, .rbx = o->addr, .rdi = o->addr, .rdx = o->value, .rax = o->expected, .r11 = 2, .rip = o->rip };
	if (o->op == WRMSR) { g.rcx = 0xc0000080; g.rax = (uint32_t)o->value; g.rdx = o->value >> 32; }
	if (o->arg) g.rip -= o->arg; // a stub with an instruction before the one under test
	if (o->cpl) { g.rcx = g.rip; g.rip = head.sysret; g.rsp = o->addr + 8; }
	CHECK(ioctl(vcpu[c], KVM_SET_REGS, &g));
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
	if (res->status == STOPPED) return;
	struct kvm_sregs r;
	CHECK(ioctl(vcpu[c], KVM_GET_REGS, &g));
	CHECK(ioctl(vcpu[c], KVM_GET_SREGS, &r));
	if (run[c]->exit_reason != KVM_EXIT_HLT) { res->status = STOPPED; res->err = run[c]->exit_reason; return; }
	if (!tame(o, &g, r.cr2)) { res->status = STOPPED; res->err = 0x3000; res->addr = g.rip; return; }
	const uint64_t *top = (const void *)(ram + RT + (g.rsp & 0xff8));
	if (g.rip == head.pf_entry + 1) { res->status = PAGE_FAULT; res->err = top[0]; res->addr = r.cr2; }
	else if (g.rip == head.gp_entry + 1) { res->status = GP; res->err = top[0]; }
	else if (res->mmios) { res->status = MMIO; res->addr = res->mmio[0].gpa; res->err = res->mmio[res->mmios - 1].write; }
	if (o->op == READ && res->status != PAGE_FAULT) res->value = g.rdx & (o->size == 8 ? ~0ull : (1ull << 8 * o->size) - 1);
}

static void host(const struct op *o, struct result *res)
{
	static uint8_t bitmap[1 << 17];
	switch (o->op) {
	case HWRITE: memcpy(ram + o->addr, &o->value, o->size); break;
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
