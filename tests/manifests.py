"""Checks what is under deploy/ without a cluster and without a network.

    python -m tests.manifests

What Kubernetes itself defines is checked against its own schemas (the package kubernetes-validate
ships them), strictly: a field that it does not know is a fault. For what operators define, and for
compose.yaml, the fields that we use are written down here, with the pages that define them; one
that is not here is a fault as well.
"""

import sys
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import yaml
from jsonschema import Draft202012Validator, ValidationError  # type: ignore[import-untyped]

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "kubernetes"
# The oldest that has all we use (lifecycle.preStop.sleep), and the newest there is a schema of.
VERSIONS = ("1.34", "1.37")

# A shape is a type; a list of one shape; a set of the values that are allowed; a dictionary of the
# fields that are allowed, in which `!` marks those that must be there; or {str: shape}, whose keys
# are free.
Shape = Any

METADATA: Shape = {"name!": str, "namespace": str, "labels": {str: str}, "annotations": {str: str}}
SECRET: Shape = {"name!": str}
POLICY: Shape = {
    "type!": {"Pods", "Percent"},
    "value!": int,
    "periodSeconds!": int,
}
RULES: Shape = {
    "policies": [POLICY],
    "selectPolicy": {"Max", "Min", "Disabled"},
    "stabilizationWindowSeconds": int,
}

CUSTOM: dict[str, Shape] = {
    # https://kustomize.io, kustomization.yaml
    "kustomize.config.k8s.io/v1beta1 Kustomization": {
        "apiVersion!": str,
        "kind!": str,
        "namespace": str,
        "resources!": [str],
        "images": [{"name!": str, "newName": str, "newTag": str, "digest": str}],
    },
    # https://keda.sh/docs/2.18/concepts/authentication
    "keda.sh/v1alpha1 TriggerAuthentication": {
        "apiVersion!": str,
        "kind!": str,
        "metadata!": METADATA,
        "spec!": {"secretTargetRef!": [{"parameter!": str, "name!": str, "key!": str}]},
    },
    # https://keda.sh/docs/2.18/reference/scaledobject-spec and .../scalers/postgresql
    "keda.sh/v1alpha1 ScaledObject": {
        "apiVersion!": str,
        "kind!": str,
        "metadata!": METADATA,
        "spec!": {
            "scaleTargetRef!": {
                "name!": str,
                "apiVersion": str,
                "kind": str,
                "envSourceContainerName": str,
            },
            "pollingInterval": int,
            "cooldownPeriod": int,
            "initialCooldownPeriod": int,
            "idleReplicaCount": int,
            "minReplicaCount": int,
            "maxReplicaCount": int,
            "fallback": {"failureThreshold!": int, "replicas!": int},
            "advanced": {
                "restoreToOriginalReplicaCount": bool,
                "horizontalPodAutoscalerConfig": {
                    "name": str,
                    "behavior": {"scaleUp": RULES, "scaleDown": RULES},
                },
            },
            "triggers!": [
                {
                    "type!": {"postgresql"},
                    "name": str,
                    "metricType": {"AverageValue", "Value"},
                    "useCachedMetrics": bool,
                    "authenticationRef": {"name!": str, "kind": str},
                    # All of a trigger's metadata are strings; numbers are refused.
                    "metadata!": {
                        "query!": str,
                        "targetQueryValue!": str,
                        "activationTargetQueryValue": str,
                        "host!": str,
                        "port!": str,
                        "dbName!": str,
                        "sslmode!": {"require", "verify-ca", "verify-full"},
                    },
                }
            ],
        },
    },
    # https://cloudnative-pg.io/docs/1.30/cloudnative-pg.v1
    "postgresql.cnpg.io/v1 Cluster": {
        "apiVersion!": str,
        "kind!": str,
        "metadata!": METADATA,
        "spec!": {
            "description": str,
            "instances!": int,
            "imageName": str,
            "imageCatalogRef": {"apiGroup!": str, "kind!": str, "name!": str, "major!": int},
            "primaryUpdateStrategy": {"unsupervised", "supervised"},
            "primaryUpdateMethod": {"switchover", "restart"},
            "enableSuperuserAccess": bool,
            "enablePDB": bool,
            "bootstrap": {
                "initdb": {
                    "database": str,
                    "owner": str,
                    "secret": SECRET,
                    "dataChecksums": bool,
                    "encoding": str,
                    "locale": str,
                    "localeCollate": str,
                    "localeCType": str,
                    "localeProvider": {"builtin", "icu", "libc"},
                    "builtinLocale": str,
                    "walSegmentSize": int,
                    "postInitSQL": [str],
                    "postInitApplicationSQL": [str],
                    "postInitTemplateSQL": [str],
                },
            },
            "managed": {
                "roles": [
                    {
                        "name!": str,
                        "comment": str,
                        "ensure": {"present", "absent"},
                        "passwordSecret": SECRET,
                        "disablePassword": bool,
                        "connectionLimit": int,
                        "validUntil": str,
                        "inRoles": [str],
                        "inherit": bool,
                        "login": bool,
                        "superuser": bool,
                        "createdb": bool,
                        "createrole": bool,
                        "replication": bool,
                        "bypassrls": bool,
                    }
                ],
            },
            "postgresql": {
                "parameters": {str: str},
                "synchronous": {
                    "method!": {"any", "first"},
                    "number!": int,
                    "maxStandbyNamesFromCluster": int,
                    "standbyNamesPre": [str],
                    "standbyNamesPost": [str],
                    "dataDurability": {"required", "preferred"},
                    "failoverQuorum": bool,
                },
                "pg_hba": [str],
                "shared_preload_libraries": [str],
            },
            "storage!": {"size": str, "storageClass": str, "resizeInUseVolumes": bool},
            "walStorage": {"size": str, "storageClass": str, "resizeInUseVolumes": bool},
            "resources": {
                "requests": {"cpu": str, "memory": str},
                "limits": {"cpu": str, "memory": str},
            },
            "affinity": {
                "enablePodAntiAffinity": bool,
                "podAntiAffinityType": {"preferred", "required"},
                "topologyKey": str,
                "nodeSelector": {str: str},
            },
            "plugins": [
                {"name!": str, "enabled": bool, "isWALArchiver": bool, "parameters": {str: str}}
            ],
        },
    },
    "postgresql.cnpg.io/v1 ScheduledBackup": {
        "apiVersion!": str,
        "kind!": str,
        "metadata!": METADATA,
        "spec!": {
            "schedule!": str,
            "cluster!": {"name!": str},
            "method": {"plugin", "volumeSnapshot", "barmanObjectStore"},
            "pluginConfiguration": {"name!": str, "parameters": {str: str}},
            "backupOwnerReference": {"none", "self", "cluster"},
            "immediate": bool,
            "suspend": bool,
            "target": {"primary", "prefer-standby"},
        },
    },
}

# https://docs.docker.com/reference/compose-file/services
DEPENDENCY: Shape = {
    "condition!": {"service_started", "service_healthy", "service_completed_successfully"}
}
COMPOSE: Shape = {
    "name": str,
    "services!": {
        str: {
            "image!": str,
            "build": {"context!": str, "dockerfile": str},
            "command": [str],
            "restart": {"no", "always", "on-failure", "unless-stopped"},
            "stop_signal": str,
            "stop_grace_period": str,
            "depends_on": {str: DEPENDENCY},
            "environment": {str: str},
            "env_file": [{"path!": str, "required": bool}],
            "healthcheck": {
                "test!": [str],
                "interval": str,
                "timeout": str,
                "retries": int,
                "start_period": str,
            },
            "ports": [str],
            "networks": [str],
            "volumes": [str],
            "user": str,
            "read_only": bool,
            "tmpfs": [str],
            "cap_drop": [str],
            "cap_add": [str],
            "security_opt": [str],
            "init": bool,
            "shm_size": str,
            "mem_limit": str,
            "pids_limit": int,
            "logging": {"driver!": str, "options": {str: str}},
        }
    },
    "networks": {str: {"internal": bool}},
    "volumes": {str: {"name": str, "driver": str}},
}


def resources() -> dict[str, dict[str, Any]]:
    """All that is under deploy/kubernetes, by "kind name"; and the kustomization."""
    found = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        for resource in yaml.safe_load_all(file.read_text()):
            name = f"{resource['kind']} {resource.get('metadata', {}).get('name', file.stem)}"
            assert name not in found, f"{name} is there twice"
            found[name] = resource
    return found


def compose() -> dict[str, Any]:
    """What compose.yaml says."""
    read: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    return read


def faults(resource: dict[str, Any]) -> list[str]:
    """What is wrong with a resource, one line each."""
    name = f"{resource['apiVersion']} {resource['kind']}"
    if name in CUSTOM:
        return misfits(resource, CUSTOM[name])
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(resource, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{_place(error)}: {error.message} (Kubernetes {version})")
        except kubernetes_validate.SchemaNotFoundError as error:
            found.append(error.message)
    return found


def misfits(value: Any, shape: Shape) -> list[str]:
    """Where a value is not of a shape, one line each."""
    validator = Draft202012Validator(_schema(shape))
    return [f"{_place(error)}: {error.message}" for error in validator.iter_errors(value)]


def _schema(shape: Shape) -> dict[str, Any]:
    """A shape as a JSON Schema."""
    match shape:
        case type():
            return {"type": {str: "string", int: "integer", bool: "boolean"}[shape]}
        case set():
            return {"enum": sorted(shape)}
        case [each]:
            return {"type": "array", "items": _schema(each)}
        case dict() if str in shape:
            return {"type": "object", "additionalProperties": _schema(shape[str])}
        case dict():
            return {
                "type": ["object", "null"],  # YAML's way to write one without any field
                "properties": {
                    name.removesuffix("!"): _schema(each) for name, each in shape.items()
                },
                "required": [name.removesuffix("!") for name in shape if name.endswith("!")],
                "additionalProperties": False,
            }
    raise TypeError(shape)


def _place(error: ValidationError) -> str:
    return ".".join(map(str, error.absolute_path)) or "it"


def main() -> int:
    """Say of each resource whether it is valid."""
    checked = {name: (faults(resource), resource["apiVersion"]) for name, resource in
               resources().items()}  # fmt: skip
    checked["compose.yaml"] = list(misfits(compose(), COMPOSE)), "compose"
    for name, (found, version) in checked.items():
        print(f"{'FAIL' if found else 'ok  '}  {name:<35} {version}")
        for fault in found:
            print(f"      {fault}")
    wrong = sum(bool(found) for found, _ in checked.values())
    versions = " and ".join(VERSIONS)
    print(f"{len(checked) - wrong} of {len(checked)} valid (Kubernetes {versions}, strictly)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
