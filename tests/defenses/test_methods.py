"""The registry: every name can be built and trains, options are checked by path, flags find their place."""

from __future__ import annotations

from dataclasses import fields

import pytest

from defenses.errors import CalibrationError, VectorError
from defenses.methods import METHODS, Materials, describe_methods, entry_of, options_of, require_holdout
from defenses.options import default_options
from records.config_files import ConfigError


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_is_known_of_it_and_has_defaults(name):
    entry = METHODS[name]
    assert entry.name == name and len(entry.evidence) > 20 and entry.text
    options = options_of({"name": name})
    assert (options is None) == (entry.options_kind is None)
    whole, part = entry.cost(options)
    assert whole >= 0 and part >= 0


@pytest.mark.parametrize("name", METHODS)
def test_every_daily_flag_changes_the_option_it_stands_for(name):
    values = {
        "alpha": 3.25, "schedule": "rise", "onset": 0.25, "end": 3.5, "stop": 0.75, "relative": True, "scope": "all",
        "fpr": 0.125, "action": "mask",
    }  # fmt: skip
    entry = METHODS[name]
    injects = any(place.startswith("action.strength") for place in entry.shared.values())
    for flag, place in entry.shared.items():
        given = {flag: values[flag]}
        if flag in ("onset", "end"):
            given["schedule"] = "rise"  # a constant has neither
        if place.startswith("action.strength"):
            given["action"] = "inject"
        base = {"name": name, "when": "next_epoch"} if name == "first_order" else {"name": name}
        found = options_of(base, given)
        for part in place.split("."):
            found = getattr(found, part)
        assert getattr(found, "value", found) == values[flag]
    assert not injects or "action" in entry.shared


def test_partial_options_keep_the_methods_own_defaults():
    found = options_of({"name": "immune_projection"}, {"schedule": "rise"})
    assert found.strength.alpha == 5.0 and found.strength.shape == "rise"  # 5 is this method's, not Strength's
    assert options_of({"name": "delta_loss", "threshold": {"value": 0.3}}).threshold.value == 0.3
    found = options_of({"name": "delta_loss", "action": "inject", "threshold": {"rate": 0.2}}, {"alpha": 2})
    assert (found.action.kind, found.action.strength.alpha, found.threshold.kind) == ("inject", 2.0, "quantile")
    assert options_of({"name": "immune_projection", "layers": "1,3"}).layers == (1, 3)


@pytest.mark.parametrize(
    ("method", "shared", "text"),
    [
        ({"name": "injecton"}, {}, "Method 'injecton': there is none. Did you mean injection?"),
        ({"name": "delta_loss", "detecton_alpha": 1}, {}, r"method\.detecton_alpha.*Did you mean detection_alpha"),
        ({"name": "injection", "strength": {"alfa": 1}}, {}, r"method\.strength\.alfa.*Did you mean alpha"),
        ({"name": "delta_loss", "threshold": {"kind": "quantil"}}, {}, r"threshold\.kind: .*Did you mean quantile"),
        ({"name": "delta_loss", "strategy": "mena"}, {}, r"method\.strategy: 'mena': Input should be 'mean' or 'min'"),
        ({"name": "delta_loss", "detection_alpha": 0}, {}, "both passes would be the same"),
        ({"name": "sft", "alpha": 1}, {}, r"method\.alpha: method sft has no options"),
        ({"name": "sft"}, {"alpha": 1}, "--alpha 1: method sft has no use for it. Leave it out"),
        ({"name": "delta_loss"}, {"alpha": 1}, "--alpha: what delta_loss does with the suspicious is no injection"),
        ({"name": "delta_loss"}, {"fpr": 1.5}, "it is 1.5. Give a share between 0 and 1"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(method, shared, text):
    with pytest.raises(ConfigError, match=text):
        options_of(method, shared)


def test_methods_that_need_directions_or_clean_data_say_so():
    entry = entry_of("injection")
    with pytest.raises(VectorError, match=r"Method injection: no --vectors were given\. Make some"):
        entry.build(options_of({"name": "injection"}), Materials())
    entry, options = entry_of("delta_loss"), options_of({"name": "delta_loss"}, {"fpr": 0.1})
    with pytest.raises(CalibrationError, match="8 clean examples to calibrate on, and at least 9 are needed"):
        require_holdout(entry, options, 8)
    require_holdout(entry, options, 9)
    require_holdout(entry, options_of({"name": "delta_loss"}), 0)  # a fixed threshold asks for none


def test_the_listing_names_every_method_option_and_sentence():
    text = describe_methods()
    for name, entry in METHODS.items():
        assert f"{name}: {entry.text}" in text and entry.evidence in text
        if entry.options_kind is not None:
            named = {one.partition(".")[0] for one, _ in default_options(entry.options_kind)}
            assert named == {one.name for one in fields(entry.options_kind)}
