"""Ray clusters: submitting to one, and KubeRay's manifests with what makes and checks them."""
