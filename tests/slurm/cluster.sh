#!/usr/bin/env bash
# Run a command in a Slurm cluster of this one machine, which ends with it: bash tests/slurm/cluster.sh COMMAND …
# Needs root and Debian's packages slurm-wlm and munge. Nothing of the system's own Slurm or munge is read or changed.
set -euo pipefail

for program in munged slurmctld slurmd srun; do
  command -v "$program" > /dev/null || { echo "$program is missing: apt-get install slurm-wlm munge"; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "the daemons of Slurm start jobs as their users, which only root may"; exit 2; }

folder=$(mktemp -d)
chmod 755 "$folder"
node=$(hostname -s)
dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
chmod 400 "$folder/munge.key"
cat > "$folder/slurm.conf" <<CONF
ClusterName=ivtp
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=60
NodeName=$node NodeAddr=127.0.0.1 $(slurmd -C | grep -oE '(CPUs|Boards|SocketsPerBoard|CoresPerSocket|ThreadsPerCore)=[0-9]+' | tr '\n' ' ') State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
mkdir "$folder/state" "$folder/spool"
export SLURM_CONF=$folder/slurm.conf

stop() {
  scancel --full --state=RUNNING --state=PENDING 2> /dev/null || true
  for daemon in slurmd slurmctld munged; do
    [ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" 2> /dev/null
  done
  sleep 1
  rm -rf "$folder"
}
trap stop EXIT

munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
slurmctld
slurmd
for _ in $(seq 60); do
  sinfo --noheader --format=%T 2> /dev/null | grep -q idle && break
  sleep 0.5
done
sinfo --noheader --format='%D node(s) %T, %c CPUs, Slurm %v' 2> /dev/null || { tail -n 5 "$folder"/*.log; exit 1; }
"$@"
