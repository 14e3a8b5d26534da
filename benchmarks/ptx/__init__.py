"""The kernels without a GPU: what nvcc and Triton compile them to, PTX, run instruction by instruction on the CPU.

    source     PTX taken apart
    machine    threads, barriers, branches; pending: copies and products under way; memory: who touched what; report
    decode     an instruction into what runs it: arithmetic, access (to memory), products (of the tensor cores) and
               tensor_memory (those of Blackwell)
    triton_kernels, cuda_kernels     this package's kernels and how they are launched

It knows the instructions that these kernels are compiled to for sm_80, 90, 100 and 120, and refuses all others by name.
"""
