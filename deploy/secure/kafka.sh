#!/bin/bash
# Creates the users of Kafka, and grants each service what the topology draws. Runs once, in the
# network of the broker's container, where the plaintext listener for operators is. Safe to repeat.
set -euo pipefail
broker=localhost:19094
export KAFKA_HEAP_OPTS=-Xmx96m KAFKA_JVM_PERFORMANCE_OPTS='-XX:+UseSerialGC -XX:TieredStopAtLevel=1'
umask 077
while read -r user password; do
  # In a file, because `ps` shows arguments.
  printf 'SCRAM-SHA-512=password=%s\n' "$password" > /tmp/scram.properties
  /opt/kafka/bin/kafka-configs.sh --bootstrap-server "$broker" --alter --add-config-file /tmp/scram.properties \
    --entity-type users --entity-name "$user" < /dev/null
done < /run/secrets/kafka-users
while read -ra arguments; do
  /opt/kafka/bin/kafka-acls.sh --bootstrap-server "$broker" "${arguments[@]}" < /dev/null
done < /run/secrets/kafka-acls
