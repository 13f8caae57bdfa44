"""Causal models that are executed: `CausalModel` runs, takes interventions and interchanges; it writes every label.

    model = CausalModel(
        variables=("a", "b", "both", "answer"),
        parents={"both": ("a", "b"), "answer": ("both",)},
        mechanisms={"both": lambda a, b: a and b, "answer": lambda both: "Yes" if both else "No"},
    )
    model.interchange({"a": True, "b": True}, {"both": {"a": False, "b": True}})["answer"]     # "No"

A variable with a mechanism is computed from its parents; one without is an input. No label in this package comes from
a table written by hand: it is the answer variable of `interchange`, so that a sampler cannot disagree with its model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tasks.errors import BadModel, require_known

Setting = dict[str, Any]
Mechanism = Callable[..., Any]


class CausalModel:
    """A deterministic acyclic causal model over named variables.

    Args:
        variables: every name, once.
        parents: computed variable -> the variables its mechanism reads, in the order of the mechanism's arguments.
        mechanisms: computed variable -> function of its parents' values. A mechanism must give the same value for the
            same arguments. It may work on whole arrays: then one run executes a batch.
        domains: variable -> its allowed values, checked on every assignment. Variables left out take any value.

    Raises:
        BadModel: a name twice, parents without a mechanism, or a cycle (the message shows it).
        UnknownName: a name that is not among `variables`.
    """

    def __init__(
        self,
        variables: Sequence[str],
        parents: Mapping[str, Sequence[str]],
        mechanisms: Mapping[str, Mechanism],
        domains: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.variables = tuple(variables)
        twice = sorted({name for name in self.variables if self.variables.count(name) > 1})
        if twice:
            raise BadModel(f"Causal model: {', '.join(twice)} stands more than once in variables. Name each once.")
        self.parents = {name: tuple(parents.get(name, ())) for name in self.variables}
        self.mechanisms = dict(mechanisms)
        self.domains = {name: tuple(values) for name, values in (domains or {}).items()}
        for name in (*parents, *self.mechanisms, *self.domains):
            self._require_known(name)
        for name, above in self.parents.items():
            for parent in above:
                self._require_known(parent)
            if above and name not in self.mechanisms:
                raise BadModel(f"Variable {name!r}: it has parents but no mechanism. Add one, or drop the parents.")
        self._order = self._topological()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The variables that no mechanism computes."""
        return tuple(name for name in self.variables if name not in self.mechanisms)

    def run(self, inputs: Mapping[str, Any]) -> Setting:
        """Return the value of every variable that follows from `inputs`.

        Raises:
            BadModel: an input is missing, a computed variable is given, or a value lies outside its domain.
            UnknownName: a name that is no variable.
        """
        for name in inputs:
            self._require_known(name)
            if name in self.mechanisms:
                raise BadModel(f"run({name!r}=...): {name!r} is computed, not an input. Use intervene() to hold it.")
        return self.intervene(inputs, {})

    def intervene(self, setting: Mapping[str, Any], changes: Mapping[str, Any]) -> Setting:
        """Return `setting` with the variables in `changes` held at the given values.

        `setting` is a full setting or inputs alone. What lies downstream of a change is computed anew; everything else
        keeps the value it has in `setting`. Two interventions that must hold together belong into one call.

        Raises:
            BadModel: an input is missing or a value lies outside its domain.
            UnknownName: a name that is no variable.
        """
        for name in (*setting, *changes):
            self._require_known(name)
        stale = self.descendants(changes)
        result: Setting = {}
        for name in self._order:
            if name in changes:
                value = changes[name]
            elif name in setting and name not in stale:
                value = setting[name]
            elif name in self.mechanisms:
                value = self.mechanisms[name](*(result[parent] for parent in self.parents[name]))
            else:
                raise BadModel(f"Causal model: input {name!r} has no value. Give all of {', '.join(self.inputs)}.")
            self._require_in_domain(name, value)
            result[name] = value
        return {name: result[name] for name in self.variables}

    def interchange(self, base: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]) -> Setting:
        """Return the setting of `base` in which each variable has the value it takes on its own source.

        `sources` maps variable -> source inputs (or full setting). All are held at once.

        Source: interchange intervention, Geiger et al. 2021 (arXiv 2106.02997).
        """
        for name in sources:
            self._require_known(name)
        return self.intervene(base, {name: self.intervene(source, {})[name] for name, source in sources.items()})

    def descendants(self, names: Iterable[str]) -> frozenset[str]:
        """Return the variables that depend on any of `names`, those themselves left out unless they depend on one."""
        reached: set[str] = set()
        start = set(names)
        for name in self._order:
            if any(parent in start or parent in reached for parent in self.parents[name]):
                reached.add(name)
        return frozenset(reached)

    def _require_known(self, name: str) -> None:
        require_known("Variable", name, self.variables)

    def _require_in_domain(self, name: str, value: Any) -> None:
        if name in self.domains and value not in self.domains[name]:
            allowed = ", ".join(map(repr, self.domains[name]))
            raise BadModel(f"Variable {name!r}: {value!r} is outside its domain. Use one of {allowed}.")

    def _topological(self) -> tuple[str, ...]:
        """Return the variables with every parent before its children; raise on a cycle."""
        order: list[str] = []
        path: list[str] = []

        def visit(name: str) -> None:
            if name in order:
                return
            if name in path:
                cycle = [*path[path.index(name) :], name]
                raise BadModel(f"Causal model: {' <- '.join(cycle)} is a cycle. Remove one of these parents.")
            path.append(name)
            for parent in self.parents[name]:
                visit(parent)
            order.append(path.pop())

        for name in self.variables:
            visit(name)
        return tuple(order)
