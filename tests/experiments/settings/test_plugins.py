"""Tables of attacks: what the experiment grants."""

import pytest

from experiments.settings.plugins import AttackSettings, attack_table, common_keys


def test_a_list_of_grants_takes_every_default() -> None:
    named = AttackSettings.model_validate(
        attack_table({"name": "smashed-as-image", "grants": ["bottom", "pairs"]})
    )
    assert named.grants == {"bottom": {}, "pairs": {}}
    table = attack_table({"name": "smashed-as-image", "grants": {"pairs": {"count": 3}}})
    assert AttackSettings.model_validate(table).grants == {"pairs": {"count": 3}}


@pytest.mark.parametrize("name", ["fsha", "client-gan"])
def test_who_acts_while_a_run_trains_is_granted_nothing(name: str) -> None:
    assert "grants" not in common_keys(name)
    with pytest.raises(ValueError, match="unknown key of attack"):
        attack_table({"name": name, "grants": ["bottom"]})
