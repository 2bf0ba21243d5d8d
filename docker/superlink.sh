#!/bin/sh
# Start the SuperLink, with a connection to it for `docker compose exec superlink feddm run site`.
set -eu
mkdir -p "$FLWR_HOME"
if [ ! -e "$FLWR_HOME/config.toml" ]; then
    printf '[superlink]\ndefault = "site"\n\n[superlink.site]\naddress = "%s"\nroot-certificates = "%s"\n' \
        "localhost:8000" "/run/secrets/ca.crt" > "$FLWR_HOME/config.toml"
fi
exec flower-superlink "$@"
