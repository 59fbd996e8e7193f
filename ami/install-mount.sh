#!/bin/bash
# Installs what `mount -t KIND` needs, unless it is there: amazon-efs-utils (efs, s3files) or the Lustre client (lustre).
#   install-mount.sh KIND [WHEELHOUSE]     with a wheelhouse, its *.deb files are installed and nothing is downloaded
set -euo pipefail

kind=$1
wheelhouse=${2:-}
KEYRING=${KEYRING:-/usr/share/keyrings/fsx-lustre.gpg}
SOURCES=${SOURCES:-/etc/apt/sources.list.d/fsx-lustre.list}
apt=(apt-get -o DPkg::Lock::Timeout=600 -q -y)  # unattended-upgrades holds the lock for minutes after a boot
export DEBIAN_FRONTEND=noninteractive

if command -v "mount.$kind" >/dev/null; then
    exit 0
fi
if [ -n "$wheelhouse" ] && compgen -G "$wheelhouse/*.deb" >/dev/null; then
    "${apt[@]}" install "$wheelhouse"/*.deb
elif [ "$kind" = lustre ]; then  # AWS's own repository; its modules follow Ubuntu's kernels by some weeks
    curl -fsS --retry 5 https://fsx-lustre-client-repo-public-keys.s3.amazonaws.com/fsx-ubuntu-public-key.asc |
        gpg --dearmor >"$KEYRING"
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    echo "deb [signed-by=$KEYRING] https://fsx-lustre-client-repo.s3.amazonaws.com/ubuntu $codename main" >"$SOURCES"
    "${apt[@]}" update
    "${apt[@]}" install "lustre-client-modules-$(uname -r)"
else
    installer=$(mktemp)
    APT_CONFIG=$(mktemp)  # the installer's own apt-get must wait for the lock, too
    export APT_CONFIG
    trap 'rm -f "$installer" "$APT_CONFIG"' EXIT
    echo 'DPkg::Lock::Timeout "600";' >"$APT_CONFIG"
    curl -fsS --retry 5 -o "$installer" https://amazon-efs-utils.aws.com/efs-utils-installer.sh
    sh "$installer" --install
fi
command -v "mount.$kind" >/dev/null || { echo "no mount.$kind after the installation" >&2; exit 1; }
