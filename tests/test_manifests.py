"""The manifests of docker/kubernetes: what the API's schema takes, and what a cluster that is shared asks of a pod."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

KUBERNETES = Path(__file__).parent.parent / "docker" / "kubernetes"
VERSION = "1.32"  # older clusters are not maintained


def applied(overlay: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` makes of an overlay, but for labels and the names of images."""
    folder = KUBERNETES / overlay
    (asked,) = documents(folder / "kustomization.yaml")
    assert {*asked} <= {"apiVersion", "kind", "resources", "patches", "labels", "images"}
    found = []
    for name in asked["resources"]:
        place = (folder / name).resolve()
        found += applied(str(place.relative_to(KUBERNETES))) if place.is_dir() else documents(place)
    for patch in asked.get("patches", ()):
        (change,) = documents(folder / patch["path"])
        (target,) = (one for one in found if named(one) == named(change))
        merge(target, change)
    return found


def documents(path: Path) -> list[dict[str, Any]]:
    return [*yaml.safe_load_all(path.read_text())]


def named(one: dict[str, Any]) -> tuple[str, str]:
    return one["kind"], one["metadata"]["name"]


def merge(target: dict[str, Any], change: dict[str, Any]) -> None:
    """A strategic merge: of lists, those with the same name."""
    for key, value in change.items():
        if isinstance(value, dict):
            merge(target.setdefault(key, {}), value)
        elif isinstance(value, list):
            for item in value:
                merge(next(one for one in target[key] if one["name"] == item["name"]), item)
        else:
            target[key] = value


@pytest.mark.parametrize("overlay", ["server", "site", "site-gpu"])
def test_the_api_takes_every_manifest(overlay: str) -> None:
    for one in applied(overlay):
        kubernetes_validate.validate(one, VERSION, strict=True)
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("overlay", ["server", "site", "site-gpu"])
def test_a_pod_can_do_no_more_than_it_must(overlay: str) -> None:
    found = applied(overlay)
    workloads = [one for one in found if one["kind"] in ("Deployment", "StatefulSet")]
    guarded = [one["spec"]["selector"]["matchLabels"] for one in found if one["kind"] == "PodDisruptionBudget"]
    for one in workloads:
        pod = one["spec"]["template"]["spec"]
        assert one["spec"]["selector"]["matchLabels"] in guarded
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"]
            assert not own["allowPrivilegeEscalation"]
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert container["livenessProbe"]
            assert {"cpu", "memory"} <= {*container["resources"]["requests"]}
            assert "memory" in container["resources"]["limits"]
            written = {place["name"] for place in container["volumeMounts"]}
            claims = {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", ())}
            assert written <= {volume["name"] for volume in pod["volumes"]} | claims
    policies = [one["spec"] for one in found if one["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    assert ("nvidia.com/gpu" in str(workloads)) == overlay.endswith("gpu")
    if overlay.startswith("site"):
        assert not any("ingress" in policy for policy in policies)  # nobody calls a site
