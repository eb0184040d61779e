"""SDAR: what it must know, and where it names labels."""

from attacks.adversarial_regularization import AdversarialRegularization
from leakbed.contracts import Evidence, Knowledge, Watcher
from tests.attacks.building_blocks.test_simulated_bottom import view


def test_it_owns_labelled_images_and_reads_its_own_part() -> None:
    threat = AdversarialRegularization().threat
    assert threat.evidence == {Evidence.SMASHED, Evidence.ROUND_SMASHED}
    assert threat.needs == {
        Knowledge.ARCHITECTURE,
        Knowledge.PUBLIC_IMAGES,
        Knowledge.PUBLIC_LABELS,
        Knowledge.SERVER_PART,
    }
    assert not threat.active
    assert isinstance(AdversarialRegularization(), Watcher)


def test_it_names_labels_where_the_node_keeps_its_head_alone() -> None:
    attack = AdversarialRegularization(steps=2)
    assert attack.run(view(), seed=0).labels is None
    labels = attack.run(view(upper=5), seed=0).labels
    assert labels is not None
    assert labels.shape == (8, 1)
