// What KVM's handling of events costs, as the guest's own RDTSC sees it: a minimal VMM and its guest in one file (kvm_cost.py boots it).
// Each scenario is a VM of its own. The guest runs down a list of addresses and notes, for each, what RDTSC grew by. Output:
//   E <scenario> <growth>...             one number an event, in the order of the list; "nop" is the same code without an event,
//                                        "hlt_ioctl" what the VMM's RDTSC grew by around KVM_RUN in scenario "hlt"
//   C <scenario> <counter>+<change>...   KVM's statistics over these events
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHECK(x) ({ long r_ = (x); if (r_ < 0) fail(#x); r_; })
#define STRING(x) STRING_(x)
#define STRING_(x) #x
#define MIB (1ull << 20)
#define HUGE (2 * MIB)
#define MADV_POPULATE_WRITE 23
#define EVENTS 4096 // 64 regions of 2 MiB, 64 pages each

// Guest physical, and mapped one to one. The test memory has every eighth page mapped: no neighbours that a shadow fault could prefetch.
enum { CODE = 0x1000, IDT = 0x2000, GDT = 0x3000, STACK = 0x6000, LIST = 0x10000, RESULTS = 0x20000, TABLES = 0x100000, LOW = 4 << 20 };
#define DONE 0x11 // the port that ends a loop
static const uint64_t TEST = 64 * MIB, SIZE = 64 * HUGE, DEVICE = 512 * MIB, REACH = 1024 * MIB;

// rsi: list, rdi: results, r9: number. An event may spoil rax, rbx (the address), rcx, rdx.
__asm__(".macro kind name, event, setup\n guest_\\name:\n"
	"1: mov (%rsi), %rbx\n add $8, %rsi\n"
	"rdtsc\n shl $32, %rdx\n or %rax, %rdx\n mov %rdx, %r8\n"
	"\\setup\n \\event\n"
	"2: rdtsc\n shl $32, %rdx\n or %rdx, %rax\n sub %r8, %rax\n mov %eax, (%rdi)\n"
	"add $4, %rdi\n dec %r9\n jnz 1b\n out %al, $" STRING(DONE) "\n .endm\n"
	".section .rodata\n guest:\n"
	"kind nop, nop\n"
	"kind load, \"mov (%rbx), %rax\"\n"
	"kind store, \"mov %rax, (%rbx)\"\n"
	"kind cpuid, cpuid, \"xor %eax, %eax\"\n"
	"kind hlt, hlt\n"
	"kind in, \"in $0x10, %al\"\n"
	"kind out, \"out %al, $0x10\"\n"
	"kind fault, \"mov (%rbx), %rax\", \"lea 2f(%rip), %r15\"\n"
	"guest_pf: add $8, %rsp\n mov %r15, (%rsp)\n iretq\n"
	"guest_end:\n .text\n");
extern const uint8_t guest[], guest_end[], guest_pf[];
extern const uint8_t guest_nop[], guest_load[], guest_store[], guest_cpuid[], guest_hlt[], guest_in[], guest_out[], guest_fault[];

static int irqchip, kvm, vm, vcpu, vm_stats, vcpu_stats;
static uint8_t *low, *test;
static struct kvm_run *run;
static uint64_t list[EVENTS];

static void fail(const char *what) { printf("ERROR %s: %s\n", what, strerror(errno)); exit(1); }
static uint64_t rdtsc(void) { uint32_t a, d; __asm__ volatile("rdtsc" : "=a"(a), "=d"(d)); return (uint64_t)d << 32 | a; }

struct stats { int n; char name[128][48]; uint64_t value[128]; };

static void read_stats(int fd, struct stats *s)
{
	struct kvm_stats_header h;
	CHECK(pread(fd, &h, sizeof h, 0));
	size_t size = sizeof(struct kvm_stats_desc) + h.name_size;
	s->n = 0;
	for (unsigned i = 0; i < h.num_desc; i++) {
		char b[256] __attribute__((aligned(8)));
		struct kvm_stats_desc *d = (void *)b;
		CHECK(pread(fd, b, size, h.desc_offset + i * size));
		if (d->size != 1 || s->n == 128) continue; // histograms
		snprintf(s->name[s->n], sizeof s->name[0], "%.47s", d->name);
		CHECK(pread(fd, &s->value[s->n++], 8, h.data_offset + d->offset));
	}
}

static void print_changes(int fd, const struct stats *before)
{
	static struct stats after;
	read_stats(fd, &after);
	for (int i = 0; i < after.n; i++)
		if (after.value[i] != before->value[i]) printf(" %s+%lld", after.name[i], (long long)(after.value[i] - before->value[i]));
}

static uint8_t *memory(uint64_t size, int advice)
{
	uint8_t *p = mmap(0, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED) fail("mmap");
	p += -(uintptr_t)p & (HUGE - 1);
	CHECK(madvise(p, size, advice));
	return p;
}

static void slot(int id, uint64_t gpa, void *at, uint64_t size, int flags)
{
	struct kvm_userspace_memory_region r = { .slot = id, .flags = flags, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uintptr_t)at };
	CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r));
}

static struct kvm_segment segment(int selector, int type, int l)
{
	return (struct kvm_segment){ .limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .s = 1, .l = l, .db = !l, .g = 1 };
}

static void fill_low(void)
{
	uint64_t *tables = (void *)(low + TABLES), handler = CODE + (guest_pf - guest);
	memcpy(low + CODE, guest, guest_end - guest);
	memcpy(low + IDT + 14 * 16, (uint64_t[]){ (handler & 0xffff) | 8 << 16 | 0x8eull << 40, 0 }, 16);
	memcpy(low + GDT, (uint64_t[]){ 0, 0x00af9b000000ffff, 0x00cf93000000ffff }, 24);
	tables[0] = (TABLES + 0x1000) | 0x63;
	tables[512] = (TABLES + 0x2000) | 0x63;
	for (uint64_t i = 0; i < REACH / HUGE; i++) tables[1024 + i] = (TABLES + 0x4000 + i * 4096) | 0x63;
	for (uint64_t i = 0; i < REACH / 4096; i++)
		if (i * 4096 < TABLES) tables[2048 + i] = i << 12 | 0x63;
		else if (i * 4096 < LOW) tables[2048 + i] = i << 12 | 0x61; // read-only, or npt=0 would have to write-protect them again
		else if (i % 8 == 0) tables[2048 + i] = i << 12 | 0x63;
}

static void set_registers(void)
{
	static struct { struct kvm_cpuid2 c; struct kvm_cpuid_entry2 e[128]; } cpuid;
	cpuid.c.nent = 128;
	CHECK(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
	CHECK(ioctl(vcpu, KVM_SET_CPUID2, &cpuid));
	struct kvm_sregs r;
	CHECK(ioctl(vcpu, KVM_GET_SREGS, &r));
	r.cr0 = 0x80010033; r.cr3 = TABLES; r.cr4 = 0x20; r.efer = 0xd01;
	r.cs = segment(8, 11, 1);
	r.ss = r.ds = r.es = r.fs = r.gs = segment(0x10, 3, 0);
	r.idt.base = IDT; r.idt.limit = 0xfff;
	r.gdt.base = GDT; r.gdt.limit = 0x17;
	CHECK(ioctl(vcpu, KVM_SET_SREGS, &r));
}

// Runs the guest's loop over the first `n` addresses. Whatever comes to user space is answered at once.
static void loop(const uint8_t *kind, unsigned n, uint32_t *ioctl_cost)
{
	struct kvm_regs g = { .rflags = 2, .rsp = STACK, .rip = CODE + (kind - guest), .rsi = LIST, .rdi = RESULTS, .r9 = n };
	unsigned i = 0;
	CHECK(ioctl(vcpu, KVM_SET_REGS, &g));
	for (;;) {
		uint64_t before = rdtsc();
		long r = syscall(SYS_ioctl, vcpu, KVM_RUN, 0);
		if (ioctl_cost && i < n) ioctl_cost[i++] = rdtsc() - before;
		if (r < 0 && errno == EINTR) continue;
		if (r < 0) fail("KVM_RUN");
		switch (run->exit_reason) {
		case KVM_EXIT_IO: if (run->io.port == DONE) return; // fall through: a read returns what lies there
		case KVM_EXIT_MMIO:
		case KVM_EXIT_HLT: continue;
		default: errno = run->exit_reason; fail("the guest is lost; the number is the exit");
		}
	}
}

static void set_list(unsigned n) { memcpy(low + LIST, list, n * 8); }

static void measure(const char *name, const uint8_t *kind, unsigned n)
{
	static struct stats before[2];
	static uint32_t cost[EVENTS + 1];
	set_list(n);
	read_stats(vm_stats, &before[0]); read_stats(vcpu_stats, &before[1]);
	loop(kind, n, kind == guest_hlt ? cost : 0);
	printf("C %s", name);
	print_changes(vm_stats, &before[0]); print_changes(vcpu_stats, &before[1]);
	printf("\nE %s", name);
	for (unsigned i = 0; i < n; i++) printf(" %u", ((uint32_t *)(low + RESULTS))[i]);
	puts("");
	if (kind != guest_hlt) return;
	printf("E hlt_ioctl");
	for (unsigned i = 1; i < n; i++) printf(" %u", cost[i]);
	puts("");
}

static void addresses(unsigned n, uint64_t from, uint64_t step) { for (unsigned i = 0; i < n; i++) list[i] = from + i * step; }

// KVM maps all low memory, the guest's tables included.
static void warm(void)
{
	addresses(LOW / 4096, 0, 4096);
	set_list(LOW / 4096);
	loop(guest_load, LOW / 4096, 0);
	loop(guest_nop, EVENTS, 0); // stores to the pages of results
}

static void begin(int advice, int populate, int flags)
{
	vm = CHECK(ioctl(kvm, KVM_CREATE_VM, 0));
	if (irqchip) CHECK(ioctl(vm, KVM_CREATE_IRQCHIP, 0));
	low = memory(LOW, MADV_NOHUGEPAGE);
	test = memory(SIZE, advice);
	CHECK(madvise(low, LOW, MADV_POPULATE_WRITE));
	if (populate) CHECK(madvise(test, SIZE, MADV_POPULATE_WRITE));
	fill_low();
	slot(0, 0, low, LOW, 0);
	slot(1, TEST, test, SIZE, flags);
	vcpu = CHECK(ioctl(vm, KVM_CREATE_VCPU, 0));
	run = mmap(0, CHECK(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	vm_stats = CHECK(ioctl(vm, KVM_GET_STATS_FD, 0));
	vcpu_stats = CHECK(ioctl(vcpu, KVM_GET_STATS_FD, 0));
	set_registers();
	warm();
}

static void end(void)
{
	munmap(run, CHECK(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)));
	close(vm_stats); close(vcpu_stats); close(vcpu); close(vm);
	munmap(low, LOW); munmap(test, SIZE);
}

// Of 64 touches in a row the first is in a region of 2 MiB that is new. `again`: once more, after KVM has forgotten all it had mapped.
static void touches(const char *name, const uint8_t *kind, int populate, const char *again)
{
	begin(MADV_NOHUGEPAGE, populate, 0);
	addresses(EVENTS, TEST, 8 * 4096);
	measure(name, kind, EVENTS);
	if (again) {
		slot(1, TEST, test, 0, 0);
		slot(1, TEST, test, SIZE, 0);
		warm();
		addresses(EVENTS, TEST, 8 * 4096);
		measure(again, kind, EVENTS);
	}
	end();
}

static void huge(const char *name, int populate)
{
	begin(MADV_HUGEPAGE, populate, 0);
	addresses(SIZE / HUGE, TEST, HUGE);
	measure(name, guest_store, SIZE / HUGE);
	end();
}

static void dirty_log(void)
{
	static uint64_t bitmap[64 * 512 / 64];
	struct kvm_dirty_log log = { .slot = 1, .dirty_bitmap = bitmap };
	begin(MADV_NOHUGEPAGE, 1, KVM_MEM_LOG_DIRTY_PAGES);
	addresses(EVENTS, TEST, 8 * 4096);
	set_list(EVENTS);
	loop(guest_store, EVENTS, 0);
	CHECK(ioctl(vm, KVM_GET_DIRTY_LOG, &log));
	measure("dirty", guest_store, EVENTS);
	end();
}

static void exits(void)
{
	const unsigned n = 1024;
	begin(MADV_NOHUGEPAGE, 1, 0);
	addresses(n, TEST, 0);
	measure("nop", guest_nop, n);
	measure("cpuid", guest_cpuid, n);
	if (!irqchip) measure("hlt", guest_hlt, n);
	measure("in", guest_in, n);
	measure("out", guest_out, n);
	addresses(n, TEST + 4096, 0); // not mapped by the guest
	measure("fault", guest_fault, n);
	addresses(EVENTS, DEVICE, 8 * 4096);
	measure("mmio_fresh", guest_store, EVENTS);
	addresses(n, DEVICE, 0);
	measure("mmio_load", guest_load, n);
	measure("mmio_store", guest_store, n);
	end();
}

int main(int argc, char **argv)
{
	irqchip = argc > 1 && !strcmp(argv[1], "irqchip");
	kvm = CHECK(open("/dev/kvm", O_RDWR));
	exits();
	touches("store", guest_store, 1, "store_again");
	touches("load", guest_load, 1, 0);
	touches("absent", guest_store, 0, 0);
	huge("huge", 1);
	huge("huge_absent", 0);
	dirty_log();
	puts("DONE");
	return 0;
}
