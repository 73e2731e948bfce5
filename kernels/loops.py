"""Find the register spills in the hot loops of a compiled kernel, from its assembly; needs no GPU.

A hot loop holds no other loop, apart from short ones that wait for a copy: a kernel spends its time there. A spill
outside it, or in a loop around it, runs once for each pass of the hot loop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LABEL = re.compile(r"^\s*(\.L\w+):")
# Moves between registers and a thread's own memory, which Triton uses for spills alone.
SPILL = re.compile(r"\b(?:LDL|STL)\b|\bscratch_(?:load|store)")
BRANCH = re.compile(r"\b(?:BRA|s_cbranch_\w+|s_branch)\b.*?(\.L\w+)")
ALWAYS = re.compile(r"^(?:BRA(?:\.\w+)* `|s_branch\b)")  # branches without a condition
END = re.compile(r"^(?:EXIT|RET|BRX|JMX|s_endpgm|s_setpc)")
INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/\s*)?((?:@!?U?P\w+\s+)?[A-Za-z]\w*[^;/]*)")
WAITING = 16  # instructions at most of a loop that only waits for a copy


@dataclass(frozen=True, slots=True)
class Code:
    """The instructions of a kernel, and the numbers of the possible followers of each."""

    instructions: list[str]
    followers: list[list[int]]


def read_code(assembly: str) -> Code:
    """Return the control flow of SASS (`nvdisasm -c`) or of AMD's assembly."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (matched := INSTRUCTION.match(line)) is not None:
            instructions.append(matched[1].strip())
    last = len(instructions) - 1
    followers = []
    for number, text in enumerate(instructions):
        branch = BRANCH.search(text)
        after = [labels[branch[1]]] if branch and labels.get(branch[1], last + 1) <= last else []
        if number < last and not ALWAYS.match(text) and not END.match(text):
            after.append(number + 1)
        followers.append(after)
    return Code(instructions, followers)


def hot_loops(code: Code) -> list[set[int]]:
    """Return the hot loops as sets of instruction numbers."""
    return _innermost(code, set(range(len(code.instructions))))


def spills_in_hot_loops(assembly: str) -> int:
    """Return the number of instructions in hot loops that spill a value or reload one."""
    code = read_code(assembly)
    hot = set().union(*hot_loops(code))
    return sum(bool(SPILL.search(code.instructions[number])) for number in hot)


def _innermost(code: Code, inside: set[int]) -> list[set[int]]:
    """Return the hot loops among some instructions."""
    loops: list[set[int]] = []
    for loop in _cycles(code, inside):
        entered = {after for number in set(range(len(code.followers))) - loop for after in code.followers[number]}
        heads = loop & entered or {min(loop)}
        inner = [part for part in _innermost(code, loop - heads) if len(part) > WAITING]
        loops.extend(inner or [loop])
    return loops


def _cycles(code: Code, inside: set[int]) -> list[set[int]]:
    """Return the largest sets of instructions that reach one another without leaving `inside` (Kosaraju)."""
    order: list[int] = []
    seen: set[int] = set()
    before: dict[int, list[int]] = {number: [] for number in inside}
    for number in inside:
        for after in code.followers[number]:
            if after in inside:
                before[after].append(number)
    for start in sorted(inside):
        stack = [] if start in seen else [(start, iter(code.followers[start]))]
        seen.add(start)
        while stack:
            number, rest = stack[-1]
            following = next((a for a in rest if a in inside and a not in seen), None)
            if following is None:
                order.append(number)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(code.followers[following])))
    return _components(code, order, before)


def _components(code: Code, order: list[int], before: dict[int, list[int]]) -> list[set[int]]:
    """Return the strongly connected components that hold a cycle."""
    cycles: list[set[int]] = []
    visited: set[int] = set()
    for start in reversed(order):
        if start in visited:
            continue
        component, todo = {start}, [start]
        visited.add(start)
        while todo:
            for number in before[todo.pop()]:
                if number not in visited:
                    visited.add(number)
                    component.add(number)
                    todo.append(number)
        if len(component) > 1 or start in code.followers[start]:
            cycles.append(component)
    return cycles
