"""Federated learning: who holds what, and what clients learn of it together."""

from jaxeff.federated import aggregates, compression, fed2, fusion, many, privacy, robust, secure, symmetry
from jaxeff.federated.accounting import Traffic, expected_bytes, traffic
from jaxeff.federated.activation_matching import activation_match, activations
from jaxeff.federated.aggregates import Aggregate, Member
from jaxeff.federated.algorithms import (
    About,
    Algorithm,
    Upload,
    adaptive,
    fed_avg,
    fed_bn,
    fed_nova,
    fed_opt,
    fed_prox,
    local_training,
    moon,
    scaffold,
)
from jaxeff.federated.analysis import agreement, choose_depth, class_preference, primary_classes, total_variance
from jaxeff.federated.clients import Clients, clients_of
from jaxeff.federated.fedma import FedMA, fed_ma
from jaxeff.federated.fusion import fuse
from jaxeff.federated.many import match_to, matched, merge_many
from jaxeff.federated.matching import assign, weight_match
from jaxeff.federated.nonparametric import Matching, match_units
from jaxeff.federated.paired import group_weights, paired_average
from jaxeff.federated.participation import Participation
from jaxeff.federated.partition import (
    Partition,
    by_classes,
    by_key,
    dirichlet,
    iid,
    noise_levels,
    quantity,
    with_noise,
)
from jaxeff.federated.permutation import Permutations, derive, permute, random_perms, verify
from jaxeff.federated.rounds import Federation, Report, State, as_method, federate, tested
from jaxeff.federated.symmetry import WithinGroups, within_groups
from jaxeff.federated.task import Task, classification

__all__ = [
    "About",
    "Aggregate",
    "Algorithm",
    "Clients",
    "FedMA",
    "Federation",
    "Matching",
    "Member",
    "Participation",
    "Partition",
    "Permutations",
    "Report",
    "State",
    "Task",
    "Traffic",
    "Upload",
    "WithinGroups",
    "activation_match",
    "activations",
    "adaptive",
    "aggregates",
    "agreement",
    "as_method",
    "assign",
    "by_classes",
    "by_key",
    "choose_depth",
    "class_preference",
    "classification",
    "clients_of",
    "compression",
    "derive",
    "dirichlet",
    "expected_bytes",
    "fed2",
    "fed_avg",
    "fed_bn",
    "fed_ma",
    "fed_nova",
    "fed_opt",
    "fed_prox",
    "federate",
    "fuse",
    "fusion",
    "group_weights",
    "iid",
    "local_training",
    "many",
    "match_to",
    "match_units",
    "matched",
    "merge_many",
    "moon",
    "noise_levels",
    "paired_average",
    "permute",
    "primary_classes",
    "privacy",
    "quantity",
    "random_perms",
    "robust",
    "scaffold",
    "secure",
    "symmetry",
    "tested",
    "total_variance",
    "traffic",
    "verify",
    "weight_match",
    "with_noise",
    "within_groups",
]
