"""What compiled kernels do between branches: loops, ways round them, and code that depends on a warp's vote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

ENTRY, EXIT = "<entry>", "<exit>"
_NEXT = "<next>"
BARRIERS = ("BAR", "HGMMA", "WARPGROUP")
"""SASS that all warps of a warpgroup must reach together."""
IR_BARRIERS = re.compile(r"nvvm\.barrier|nvvm\.wgmma|\bbarrier\.cta|\bbar\.(sync|arrive|red)|\bwgmma\.")
VOTE_RESULT = re.compile(r'asm sideeffect "selp\.b32 \$0, 1, 0, attn_any')


@dataclass
class Graph:
    """Blocks of instructions and the blocks that may follow each; ENTRY comes before those without predecessors."""

    blocks: dict[str, list[str]]
    successors: dict[str, list[str]]
    predecessors: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        followed = {after for successors in self.successors.values() for after in successors}
        first = next(iter(self.blocks))
        self.successors[ENTRY] = [name for name in self.blocks if name == first or name not in followed]
        self.successors[EXIT] = []
        self.blocks |= {ENTRY: [], EXIT: []}
        self.predecessors = {name: [] for name in self.blocks}
        for name, successors in self.successors.items():
            for after in successors:
                self.predecessors[after].append(name)

    def immediate_dominators(self) -> dict[str, str]:
        """The last block that every way from ENTRY passes before a block."""
        return _immediate_dominators(ENTRY, self.successors, self.predecessors)

    def meeting_points(self) -> dict[str, str]:
        """The first block that every way to EXIT passes after a block."""
        return _immediate_dominators(EXIT, self.predecessors, self.successors)

    def between(self, branch: str, end: str) -> set[str]:
        """Blocks that may run after ``branch`` and before ``end``."""
        return _reached(self.successors[branch], self.successors, end)

    def loops(self) -> Iterator[tuple[str, set[str]]]:
        """First block and all blocks of every loop."""
        parents = self.immediate_dominators()
        bodies: dict[str, set[str]] = {}
        for name in parents:
            for first in self.successors[name]:
                if first in _ancestors(name, parents):
                    body = _reached([name], self.predecessors, first) | {first}
                    bodies.setdefault(first, set()).update(body & parents.keys())
        yield from bodies.items()

    def shortest_way_round(self, first: str, body: set[str]) -> list[str]:
        """The blocks of the way through a loop with the fewest instructions."""
        best = {first: (len(self.blocks[first]), [first])}
        waiting = {first}
        while waiting:
            name = min(waiting, key=lambda block: best[block][0])
            waiting.remove(name)
            cost, way = best[name]
            if first in self.successors[name]:
                return way
            for after in self.successors[name]:
                reached = cost + len(self.blocks[after])
                if after in body and (after not in best or reached < best[after][0]):
                    best[after] = (reached, [*way, after])
                    waiting.add(after)
        raise AssertionError(f"no way back to {first}")


def _ancestors(name: str, parents: dict[str, str]) -> Iterator[str]:
    while True:
        yield name
        if parents[name] == name:
            return
        name = parents[name]


def _reached(start: Iterable[str], edges: dict[str, list[str]], end: str) -> set[str]:
    found: set[str] = set()
    waiting = [name for name in start if name != end]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [after for after in edges[name] if after != end]
    return found


def _immediate_dominators(
    root: str, forward: dict[str, list[str]], backward: dict[str, list[str]]
) -> dict[str, str]:
    """By iteration to a fixed point in reverse postorder; blocks that ``root`` does not reach are left out."""
    order = _postorder(root, forward)
    rank = {name: n for n, name in enumerate(order)}
    parents = {root: root}
    changed = True
    while changed:
        changed = False
        for name in reversed(order[:-1]):
            known = [before for before in backward[name] if before in parents]
            parent = known[0]
            for other in known[1:]:
                while parent != other:
                    if rank[parent] < rank[other]:
                        parent = parents[parent]
                    else:
                        other = parents[other]
            changed |= parents.get(name) != parent
            parents[name] = parent
    return parents


def _postorder(root: str, edges: dict[str, list[str]]) -> list[str]:
    order: list[str] = []
    seen = {root}
    stack = [(root, iter(edges[root]))]
    while stack:
        name, rest = stack[-1]
        after = next((n for n in rest if n not in seen), None)
        if after is None:
            order.append(name)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(edges[after])))
    return order


def read_sass(text: str) -> Graph:
    """Blocks of a disassembled kernel; an instruction is "[guard ]opcode operands"."""
    blocks: dict[str, list[str]] = {"start": []}
    successors: dict[str, list[str]] = {}
    name, ended = "start", False
    for line in text.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        code = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line)
        if label or (code and ended):
            # A block without a label is named by its first address.
            after = label[1] if label else code[1]
            if not ended:
                successors.setdefault(name, []).append(after)
            name, ended = after, False
            blocks[name] = []
        if code:
            blocks[name].append(code[2])
            targets, falls_through = _targets(code[2], line)
            if targets:
                successors[name] = [*targets, _NEXT] if falls_through else targets
                ended = True
    return _resolved(blocks, successors)


def _targets(instruction: str, line: str) -> tuple[list[str], bool]:
    """Where a jump may lead, and whether execution may also go on behind it; nothing for other instructions."""
    guard, opcode, operands = split(instruction)
    if opcode.startswith(("EXIT", "RET")):
        return [EXIT], bool(guard)
    if opcode.startswith("BRX"):
        return re.findall(r"\.L_x_\d+", line[line.index("BRANCH_TARGETS") :]), bool(guard)
    if opcode.startswith("BRA"):
        target = re.search(r"\.L_x_\d+", operands)
        assert target, instruction
        return [target[0]], bool(guard) or "P" in operands.split("`")[0] or "DIV" in opcode
    return [], True


def _resolved(blocks: dict[str, list[str]], successors: dict[str, list[str]]) -> Graph:
    names = list(blocks)
    for n, name in enumerate(names):
        after = [names[n + 1]] if n + 1 < len(names) else [EXIT]
        found = successors.get(name, after)
        successors[name] = [*dict.fromkeys(after[0] if target == _NEXT else target for target in found)]
    return Graph(blocks, successors)


def split(instruction: str) -> tuple[str, str, str]:
    """(guard, opcode, operands) of a SASS instruction."""
    guard, opcode, operands = re.fullmatch(r"(@!?U?P\w+\s+)?(\S+)\s*(.*)", instruction).groups()
    return (guard or "").strip(), opcode, operands


def block_loops(graph: Graph) -> list[tuple[str, set[str]]]:
    """The innermost loops with matrix products, in program order: one a consumer."""
    with_products = [
        (first, body)
        for first, body in graph.loops()
        if any(split(code)[1].startswith("HGMMA") for name in body for code in graph.blocks[name])
    ]
    order = list(graph.blocks)
    inner = [
        (first, body) for first, body in with_products if not any(other < body for _, other in with_products)
    ]
    return sorted(inner, key=lambda loop: order.index(loop[0]))


def loop_figures(graph: Graph, first: str, body: set[str]) -> dict[str, int]:
    """Products, exponentials beside a product in flight, votes, and local-memory traffic of the shortest way round."""
    opcodes = []
    for name in graph.blocks:
        if name in body:
            opcodes += [split(code)[1:] for code in graph.blocks[name]]
    overlapped, in_flight = 0, False
    for opcode, operands in opcodes:
        if opcode.startswith("WARPGROUP.DEPBAR"):
            in_flight = "0x1" in operands
        overlapped += in_flight and opcode.startswith("MUFU.EX2")
    way = [split(code)[1] for name in graph.shortest_way_round(first, body) for code in graph.blocks[name]]
    return {
        "products": sum(opcode.startswith("HGMMA") for opcode, _ in opcodes),
        "overlapped": overlapped,
        "votes": sum(opcode.startswith("VOTE.ANY") for opcode, _ in opcodes),
        "local": sum(opcode.startswith(("LDL", "STL")) for opcode in way),
        "barriers_after_votes": len(_barriers_after_votes(graph, body)),
    }


def _barriers_after_votes(graph: Graph, body: set[str]) -> list[str]:
    """Barriers between the first branch after a vote and the point where its ways meet again."""
    meeting = graph.meeting_points()
    found = []
    for name in body:
        if any(split(code)[1].startswith("VOTE.ANY") for code in graph.blocks[name]):
            while len(graph.successors[name]) == 1:
                name = graph.successors[name][0]
            for between in graph.between(name, meeting[name]):
                found += [code for code in graph.blocks[between] if split(code)[1].startswith(BARRIERS)]
    return found


def read_llvm(text: str) -> Graph:
    """Blocks of the kernel's function in LLVM IR."""
    body = re.search(r"^define [^\n]*\{\n(.*?)^\}", text, re.S | re.M)[1]
    blocks: dict[str, list[str]] = {}
    name = "start"
    for line in body.splitlines():
        label = re.match(r'("?[\w.$-]+"?):', line)
        if label:
            name = label[1]
        elif line.strip():
            blocks.setdefault(name, []).append(line.strip())
    successors = {}
    for name, lines in blocks.items():
        last = next(n for n, line in enumerate(lines) if re.match(r"br |switch |ret |unreachable", line))
        jump = " ".join(lines[last:])
        successors[name] = [*dict.fromkeys(re.findall(r'label %("?[\w.$-]+"?)', jump))] or [EXIT]
    return Graph(blocks, successors)


def divergent_barriers(graph: Graph) -> tuple[int, list[str]]:
    """How many warps' votes there are, and the barriers that only some warps may reach because of one.

    A value depends on a vote if an operand does, or if it merges different values where ways meet that a vote parted.
    """
    uses: dict[str, list[tuple[str, str]]] = {}
    tainted: list[str] = []
    for name, lines in graph.blocks.items():
        for line in lines:
            for operand in set(re.findall(r"%[\w.$-]+", line.split(" = ", 1)[-1])):
                uses.setdefault(operand, []).append((name, line))
            if VOTE_RESULT.search(line):
                tainted.append(line.split(" = ")[0])
    votes = len(tainted)
    meeting = graph.meeting_points()
    known, parted, barriers = set(tainted), set(), []
    while tainted:
        for name, line in uses.get(tainted.pop(), []):
            new = []
            if " = " in line:
                new = [line.split(" = ")[0]]
            elif re.match(r"br |switch ", line) and name not in parted:
                parted.add(name)
                between = graph.between(name, meeting[name])
                for block in between:
                    barriers += [code for code in graph.blocks[block] if IR_BARRIERS.search(code)]
                new = _merged(graph, between | {meeting[name]}, between | {name})
            tainted += [value for value in new if value not in known]
            known.update(new)
    return votes, barriers


def _merged(graph: Graph, blocks: set[str], sources: set[str]) -> list[str]:
    """Values of ``blocks`` that are not the same whichever of ``sources`` they are reached from."""
    found = []
    for name in blocks:
        for line in graph.blocks[name]:
            if " = phi " in line:
                incoming = re.findall(r'\[ (.*?), %("?[\w.$-]+"?) \]', line)
                if len({value for value, source in incoming if source in sources}) > 1:
                    found.append(line.split(" = ")[0])
    return found
