"""The main loop of a CUDA kernel, read from its machine code (SASS): what one iteration of a tile
product costs besides the product.

Static: it sees instructions, not latencies, bank conflicts or cache misses. Differences of less
than about a fifth mean nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from .devices import of_target

# dense fp16 FMA per SM and clock on tensor cores with fp32 accumulation, of an architecture's
# fastest parts: NVIDIA A100, GA102, AD102, H100, Blackwell and RTX Blackwell architecture
# whitepapers
RATE = {80: 1024, 86: 512, 89: 512, 90: 2048, 100: 4096, 120: 512}
MMA = re.compile(r"HMMA|DMMA|HGMMA|UTC[A-Z]*MMA")
LOADS = re.compile(r"LDGSTS|LDG|UTMALDG")
FMA = {"FFMA": 1, "DFMA": 1, "HFMA2": 2, "FFMA2": 2}  # multiply-accumulates of a thread
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*([^;]*);", re.M
)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    arguments: str

    @property
    def target(self) -> int | None:
        """Address of a branch's target."""
        found = (
            re.search(r"0x([0-9a-f]+)\s*$", self.arguments)
            if self.opcode.startswith(("BRA", "JMP"))
            else None
        )
        return int(found[1], 16) if found else None


def parse(text: str) -> list[Instruction]:
    """Instructions of what `cuobjdump -sass` prints for one kernel."""
    return [
        Instruction(int(address, 16), predicate, opcode, arguments.strip())
        for address, predicate, opcode, arguments in _LINE.findall(text)
    ]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Natural loops, without the blocks behind their closing branch (where waits that fail go)."""
    import networkx as nx  # comes with torch

    at = {ins.address: i for i, ins in enumerate(code)}
    leaders = sorted(
        {0}
        | {at[ins.target] for ins in code if ins.target in at}
        | {i + 1 for i, ins in enumerate(code[:-1]) if _leaves(ins)}
    )
    ends = dict(zip(leaders, [*leaders[1:], len(code)]))
    graph = nx.DiGraph()
    graph.add_nodes_from(leaders)
    for start, end in ends.items():
        last = code[end - 1]
        if last.target in at:
            graph.add_edge(start, at[last.target])
        if end < len(code) and not (
            _leaves(last)
            and last.predicate in ("", "PT", "UPT")
            and not re.match(r"!?U?P\d", last.arguments)
        ):
            graph.add_edge(start, end)
    graph.add_edge(-1, 0)
    # targets of jump tables are entries, too
    for start in leaders:
        if not nx.has_path(graph, -1, start):
            graph.add_edge(-1, start)
    dominators = nx.immediate_dominators(graph, -1)

    def dominates(a, b):
        while b not in (a, None):
            b = dominators.get(b) if dominators.get(b) != b else None
        return b == a

    found: dict[int, tuple[set, int]] = {}
    for tail, head in graph.edges:
        if dominates(head, tail):
            without_head = graph.subgraph(set(graph) - {head})
            body = {head, tail} | (nx.ancestors(without_head, tail) if tail != head else set())
            blocks, end = found.get(head, (set(), 0))
            found[head] = (blocks | body, max(end, tail))
    return [
        [one for start in sorted(blocks) if start <= end for one in code[start : ends[start]]]
        for blocks, end in found.values()
    ]


def _leaves(ins: Instruction) -> bool:
    return ins.opcode.startswith(("BRA", "JMP", "BRX", "EXIT", "RET"))


def main_loops(
    code: list[Instruction],
) -> tuple[list[list[Instruction]], list[list[Instruction]]] | None:
    """(innermost loops with the most matrix products, without loops inside them; where these do not
    load their operands, innermost loops that load): of a warp-specialised program each group of
    warps has its own."""
    everything = [frozenset(loop) for loop in loops(code)]
    hot = [loop for loop in everything if any(MMA.match(ins.opcode) for ins in loop)]
    inner = [loop for loop in hot if not any(other < loop for other in hot)]
    if not inner:
        return None
    most = max(sum(bool(MMA.match(ins.opcode)) for ins in loop) for loop in inner)
    best = [loop for loop in inner if sum(bool(MMA.match(ins.opcode)) for ins in loop) == most]
    loads = [
        loop
        for loop in everything
        if loop not in hot and any(LOADS.match(ins.opcode) for ins in loop)
    ]
    # of a producer that loads by descriptor, not what is added to results
    boxes = [loop for loop in loads if any("UTMALDG" in ins.opcode for ins in loop)]
    loads = boxes or loads
    fed = not any(LOADS.match(ins.opcode) for ins in best[0])
    found = []
    for loop in best:
        spins = frozenset().union(*(other for other in everything if other < loop))
        found.append(sorted(loop - spins, key=lambda ins: ins.address))
    return found, [list(loop) for loop in loads if fed and not any(other < loop for other in loads)]


def per_fma(code: list[Instruction]) -> float | None:
    """Instructions of the loop with the most multiply-accumulates outside tensor cores, over these;
    all of them are useful in the inner of a map."""

    def products(loop):
        return sum(FMA.get(ins.opcode.split(".")[0], 0) for ins in loop)

    best = max(loops(code), key=lambda loop: (products(loop), -len(loop)), default=[])
    return round(len(best) / products(best), 2) if products(best) else None


def measure(
    text: str, target: int, tile: tuple[int, int, int], warps: int, nbytes: int
) -> dict[str, Any]:
    """What a kernel's loop costs, from `cuobjdump -sass` output; tile is (M, N, K) of one
    iteration's product, nbytes the operands' element size.

    overhead: warp instructions that are not products, per 2048 FMA (one m16n8k16 product). bound:
    clocks of the tensor cores over those of the busiest unit of the SM, an upper bound on their
    utilisation; limiter is that unit: "tensor", "issue" or "shared". l2_bytes_per_fma: what the
    tile loads, with no reuse between programs. Without matrix products only per_fma, see there. Of
    a warp-specialised program for sm_90 the loops of all consumers and of the producer are counted
    together, loop_instructions is their sum.
    """
    code = parse(text)
    opcodes = Counter(ins.opcode for ins in code)
    mma = Counter({op: n for op, n in opcodes.items() if MMA.match(op)})
    loads: Counter = Counter()
    for op, n in opcodes.items():
        if known := LOADS.match(op):
            loads[f"{known[0]}{'' if 'UTMA' in op else '.' + _width(op)}"] += n
    row: dict[str, Any] = dict(
        spills=sum(n for op, n in opcodes.items() if op.startswith(("LDL", "STL"))),
        mma=mma.most_common(1)[0][0] if mma else "none",
        loads=dict(sorted(loads.items())),
    )
    found = main_loops(code)
    if not found:
        return row | dict(per_fma=per_fma(code))
    (m, n, k), (hot, feeding) = tile, found
    length: float
    issued: float
    multiplied: float
    loop = hot[0]
    ops = Counter(ins.opcode for ins in loop)
    # tcgen05 products are issued by one warp
    warps = 1 if feeding and row["mma"].startswith("UTC") else warps
    length, products = len(loop), sum(count for op, count in ops.items() if MMA.match(op))
    issued, multiplied = warps * length, warps * products
    # each warpgroup runs its loop once for its share of a step, or in turn
    if feeding and row["mma"].startswith("HGMMA"):
        fma = sum(
            64 * int(shape[1]) * int(shape[2])
            for ins in sum(hot, [])
            if (shape := re.match(r"HGMMA\.64x(\d+)x(\d+)", ins.opcode))
        )
        length, loaded = sum(map(len, hot)), sum(map(len, feeding))
        issued, multiplied, length = (
            4 * length * m * n * k / fma + loaded,
            4 * products * len(hot) * m * n * k / fma,
            length + loaded,
        )
    rate = RATE[max((known for known in RATE if known <= target), default=80)]
    moved = (m + n) * k * nbytes
    # each warpgroup reads its 64 rows and all columns
    if row["mma"].startswith("HGMMA"):
        read = (m + -(-m // 64) * n) * k * nbytes
    # ldmatrix reads 128 bytes per matrix and warp; tcgen05 reads each operand once
    else:
        read = (
            moved
            if "UTC" in row["mma"]
            else warps
            * sum(
                count * 128 * int((re.search(r"\.([124])$", op) or (0, 1))[1])
                for op, count in ops.items()
                if op.startswith("LDSM")
            )
        )
    clocks = {
        "tensor": m * n * k / (rate * 2 / nbytes),
        "issue": issued / 4,
        "shared": (moved + read) / 128,
    }
    return row | dict(
        loop_instructions=length,
        overhead=round((issued - multiplied) / (m * n * k / 2048), 3),
        loop_ldsm=sum(c for op, c in ops.items() if op.startswith("LDSM")),
        bound=round(clocks["tensor"] / max(clocks.values()), 3),
        limiter=max(clocks, key=clocks.__getitem__),
        l2_bytes_per_fma=round(moved / (m * n * k), 4),
    )


def programs_per_sm(target: int, registers: int, threads: int, shared_bytes: int) -> int:
    """Programs that fit on one SM. Registers are given to warps in units of 256, a program takes 1
    KiB of shared memory for the driver."""
    shared, _, most_threads, most = of_target(f"cuda:{target}").limits
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        65536 // (per_warp * warps), shared // (shared_bytes + 1024), most_threads // threads, most
    )


def _width(opcode: str) -> str:
    return next(
        (w for w in ("128", "64") if f".{w}" in opcode),
        "16" if ".U16" in opcode or ".S16" in opcode else "8" if ".U8" in opcode else "32",
    )
