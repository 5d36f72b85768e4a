# The tiny guest's source; tiny_guest.py says what it does. To assemble:
#   as --32 tiny_guest.S -o g.o && ld -m elf_i386 -Ttext 0x100000 --oformat binary g.o -o g.bin  # its warning of no entry symbol is harmless
.intel_syntax noprefix
.code32
hdr:
 .long 0x1BADB002, 0x00010003, -(0x1BADB002+0x00010003)
 .long hdr, hdr, end, end, entry
fill_pages: .long 0
dirty_per_tick: .long 0
working_set_pages: .long 1
poweroff_at: .long 0
heeds_button: .long 0
reboot_at: .long 0
entry:
 cli
 mov esp, 0x90000
 lgdt [gdtr]
 .byte 0xea; .long flush; .word 8   # ljmp
flush:
 mov ax, 16
 mov ds, ax
 mov es, ax
 mov ss, ax
 mov eax, offset tick
 mov [0x80000 + 0x20*8], ax
 mov word ptr [0x80000 + 0x20*8 + 2], 8
 mov word ptr [0x80000 + 0x20*8 + 4], 0x8e00
 shr eax, 16
 mov [0x80000 + 0x20*8 + 6], ax
 lidt [idtr]
 mov al, 0x11
 out 0x20, al
 mov al, 0x20
 out 0x21, al
 mov al, 4
 out 0x21, al
 mov al, 1
 out 0x21, al
 mov al, 0xfe
 out 0x21, al
 mov al, 0x34
 out 0x43, al
 mov al, 0x9c      # 11932 = 0x2e9c: 100 Hz
 out 0x40, al
 mov al, 0x2e
 out 0x40, al
 mov edi, 0x200000
 mov ecx, [fill_pages]
 jecxz filled
fill:
 mov [edi], edi
 add edi, 4096
 loop fill
filled:
 cmp dword ptr [heeds_button], 0
 je deaf
 mov dx, 0x602     # PM1_EN: without its bit QEMU does not press the button
 mov ax, 0x100
 out dx, ax
deaf:
 xor ebx, ebx      # ticks
 xor esi, esi      # page in the working set
idle:
 sti
 hlt
 inc ebx
 cmp ebx, [poweroff_at]
 je off
 cmp ebx, [reboot_at]
 je reboot
 cmp dword ptr [heeds_button], 0
 je run
 mov dx, 0x600     # PM1_STS
 in ax, dx
 test ah, 1
 jz run
off:
 mov dx, 0x604
 mov ax, 0x2000
 out dx, ax
 jmp run
reboot:
 mov al, 0xfe      # the keyboard controller pulls the reset line
 out 0x64, al
run:
 mov ecx, [dirty_per_tick]
 jecxz idle
dirty:
 mov edi, esi
 shl edi, 12
 add dword ptr [edi + 0x200008], 1
 inc esi
 cmp esi, [working_set_pages]
 jb next
 xor esi, esi
next:
 loop dirty
 jmp idle
tick:
 push eax
 mov al, 0x20
 out 0x20, al
 pop eax
 iretd
.balign 8
gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr: .word 23
 .long gdt
idtr: .word 0x21*8-1
 .long 0x80000
end:
