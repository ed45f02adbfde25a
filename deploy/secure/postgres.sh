#!/bin/sh
# Starts Postgres with TLS. Runs as root, before the entry point of the image.
set -eu
# Postgres refuses a key that another user may read.
install -d -o postgres -g postgres -m 0700 /tls
install -o postgres -g postgres -m 0600 /run/secrets/postgres-key /tls/key.pem
# The variables that deploy/postgres/init.sql reads. They replace those of docker-compose.yml.
set -a
. /run/secrets/postgres-passwords
set +a
exec docker-entrypoint.sh postgres -c ssl=on -c ssl_cert_file=/run/secrets/postgres -c ssl_key_file=/tls/key.pem \
  -c hba_file=/etc/postgres/pg_hba.conf
