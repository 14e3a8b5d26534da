"""The native functions. Pointers are integers; every argument is validated by `matpac_fast.ops`, none here."""

CUDA_ARCHS: str

def cuda_versions() -> tuple[int, int]: ...
def cpu_isa() -> str: ...
def cpu_is_amd() -> bool: ...
def set_cpu_isa(name: str) -> None: ...

class LogMelArgs:
    def __init__(
        self,
        wave: int,
        wave_dtype: int,
        batch: int,
        stride: int,
        hop: int,
        frames: int,
        out: int,
        out_dtype: int,
        window: int,
        bands: int,
        weights: int,
        inverse_sums: int,
        n_mels: int,
        log_offset: float,
        mean: float,
        std: float,
        /,
    ) -> None: ...

def log_mel_cpu(args: LogMelArgs, threads: int) -> None: ...
def log_mel_places() -> list[int]: ...
def log_mel_emulated(args: LogMelArgs, blocks: int, backwards: bool) -> None: ...
def log_mel_cuda(args: LogMelArgs, device: int, stream: int, /) -> None: ...
def mask_shuffle_cpu(base: int, index: int, batch: int, n_tokens: int, out: int, threads: int, /) -> None: ...

class PatchGatherArgs:
    def __init__(
        self,
        spec: int,
        itemsize: int,
        batch: int,
        batch_stride: int,
        freq_stride: int,
        grid_freq: int,
        grid_time: int,
        patch: int,
        ids: int,
        ids_stride: int,
        count: int,
        patches: int,
        table: int,
        width: int,
        tokens: int,
        /,
    ) -> None: ...

def patch_gather_cpu(args: PatchGatherArgs, threads: int) -> bool: ...

class PrototypeLossArgs:
    def __init__(
        self,
        student: int,
        teacher: int,
        center: int,
        dtype: int,
        rows: int,
        k: int,
        scales: int,
        loss: int,
        stats: int,
        delta: int,
        delta_dtype: int,
        column_sum: int,
        /,
    ) -> None: ...

def prototype_loss_forward_cpu(args: PrototypeLossArgs, threads: int) -> None: ...
def prototype_loss_delta_cpu(args: PrototypeLossArgs, threads: int) -> None: ...
def prototype_loss_forward_cuda(
    args: PrototypeLossArgs, columns: int, blocks: int, device: int, stream: int, /
) -> None: ...
def prototype_loss_delta_cuda(args: PrototypeLossArgs, device: int, stream: int) -> None: ...
def prototype_loss_forward_emulated(args: PrototypeLossArgs, columns: int, blocks: int) -> None: ...
def prototype_loss_delta_emulated(args: PrototypeLossArgs) -> None: ...

class PredictionLossArgs:
    def __init__(
        self,
        prediction: int,
        target: int,
        dtype: int,
        rows: int,
        heads: int,
        width: int,
        eps: float,
        loss: int,
        stats: int,
        grad: int,
        out: int,
        /,
    ) -> None: ...

def prediction_loss_cpu(args: PredictionLossArgs, backward: bool, threads: int) -> None: ...

class AttentionArgs:
    def __init__(
        self,
        qkv: int,
        dtype: int,
        batch: int,
        tokens: int,
        heads: int,
        width: int,
        out: int,
        stats: int,
        result: int,
        grad: int,
        /,
    ) -> None: ...

def attention_cpu(args: AttentionArgs, backward: bool, threads: int) -> None: ...

class TransposedArgs:
    def __init__(self, x: int, rows: int, width: int, out: int, sums: int, /) -> None: ...

def transposed_cpu(args: TransposedArgs, threads: int) -> None: ...
