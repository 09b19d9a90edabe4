# The code of a guest without long mode: PAE, two-level paging and paging off. What it shares with guest.S stands in stubs.inc.
# It fills the room that guest.S leaves on the same two pages, so that the host can switch a vCPU between the modes.
# A user op goes out by iret and comes back by int $0x80.

    .include "stubs.inc"
    a = %ebx
    b = %edi
    c = %ebx
    d1 = %dl
    d2 = %dx
    d4 = %edx

.macro out cpl
  .ifc \cpl,k
    hlt
  .else
    int $0x80
  .endif
.endm

.macro stubs32 cpl
  stubs \cpl
  stub \cpl, push4, push %edx
.endm

    .code32
    .org 0
start:
    .org 0x400
    stubs32 k
    supervisor_stubs
    stub k, idt, lidt 0x7c80
    .balign 8
k_user:     iret                               # frame: eip cs eflags esp ss
    .irp entry, pf, gp, df
    .balign 8
\entry\()_entry: pop %eax                      # error code
    pop %ecx                                   # EIP
\entry\()_hlt: hlt
    .endr
    .irp entry, bp, back
    .balign 8
\entry\()_entry: pop %ecx
\entry\()_hlt: hlt
    .endr
    .balign 8
other_entry: hlt                               # no test provokes these; the run is given up
code32_end:
    .org 0xb00                                 # vectors 0 to 16 and 128
idt:
    .irp entry, other, other, other, bp, other, other, other, other, df, other, other, other, other, gp, pf, other, other
    .word \entry\()_entry - start + 0x7000, 0x28
    .ifc \entry,bp
    .word 0xee00                               # CPL 3 may execute INT3
    .else
    .word 0x8e00
    .endif
    .word 0
    .endr
    .org 0xc00
tss:
    .long 0, 0x7ff0, 0x10                      # ESP0, SS0
    .org 0xc80
idtr:                                          # what the stub of LIDT loads: limit, base
    .word 0
    .long 0
    .org 0xb00 + 0x80 * 8
    .word back_entry - start + 0x7000, 0x28, 0xee00, 0
idt_end:
    .org 0x1400
    stubs32 u
    .org 0x2000
