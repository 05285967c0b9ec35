"""Names of TPU topologies."""

from stdit_jax.parallel.topology import parse_topology, topology_chips


def test_topology_names_have_a_kind_and_chips():
  assert parse_topology("v5p:4x8x8") == "v5p"
  assert parse_topology("v6e:16x16") == "v6e"
  assert topology_chips("v5p:4x8x8") == topology_chips("v6e:16x16") == 256
