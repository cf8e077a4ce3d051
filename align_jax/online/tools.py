# SPDX-License-Identifier: Apache-2.0
"""Environments that are ready to use, and patterns for one's own: a calculator, and a second try.

config.rollout.environment = "align_jax.online.tools:calculator"
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from align_jax.online.environment import Reply
from align_jax.online.rules import find_number

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_LONGEST = 200  # characters of an expression: the parser is given no depth to fall into
_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def tool_calls(said: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the tools that an answer calls, each with its arguments.

    As the chat templates of Qwen and Hermes ask for them:
    ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

    Raises:
        ValueError: a call that cannot be read.

    >>> tool_calls('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [('add', {'a': 1})]
    """
    found = []
    for text in _CALL.findall(said):
        try:
            call = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the tool call is not JSON: {error}") from None
        name = call.get("name") if isinstance(call, dict) else None
        arguments = call.get("arguments", {}) if isinstance(call, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError("a tool call has a name, a text, and arguments, an object")
        found.append((name, arguments))
    return found


def calculate(expression: str) -> float:
    """Return the value of an arithmetic expression of numbers, + - * / // % ** and parentheses.

    Raises:
        ValueError: it is none, or has no finite value.

    >>> calculate("3 * (4 + 1)"), calculate("2 ** 0.5 // 1")
    (15.0, 1.0)
    """

    def value(node: Any) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)  # type: ignore[arg-type]  # mypy reads no type(...) in
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.operand))
        raise ValueError("expected numbers and + - * / // % ** alone")

    if len(expression) > _LONGEST:
        raise ValueError(f"expected at most {_LONGEST} characters, got {len(expression)}")
    try:
        found = value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if isinstance(found, complex) or not math.isfinite(found):
        raise ValueError("it is no finite number")
    return float(found)


def calculator(said: str) -> Reply | None:
    """Answer calls of the tool ``calculator`` with the argument ``expression``; an answer without a
    call ends the episode, and a mistake in one is told to the model."""
    results = []
    try:
        for name, arguments in tool_calls(said):
            if name != "calculator" or not isinstance(arguments.get("expression"), str):
                raise ValueError('there is only calculator, of one "expression", a text')
            results.append(f"{calculate(arguments['expression']):.10g}")
    except ValueError as error:
        return Reply(f"error: {error}", role="tool")
    return Reply("\n".join(results), role="tool") if results else None


class SecondTry:
    """Says that a number is not the gold one, as often as there are turns.

    Args:
        answer: the row's column: a number, or a text that ends in one (GSM8K's ``#### 18``).
    """

    WORDS = "That is not right. Look for the mistake in your solution, and solve it again."

    def __init__(self, answer: str | int | float) -> None:
        self._gold = find_number(str(answer))

    def step(self, said: str) -> str | None:
        """End the episode where the answer's number is the gold one."""
        return None if find_number(said) == self._gold else self.WORDS
