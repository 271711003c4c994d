#!/bin/bash
# A SLURM cluster of two nodes on this machine, for tests, all of it in one folder:
#   slurm_cluster.sh start FOLDER PORT   uses PORT, PORT+1 and PORT+2; then SLURM_CONF=FOLDER/slurm.conf sbatch ...
#   slurm_cluster.sh stop FOLDER
# As root, with Debian's slurm-wlm and munge. Both nodes have all cores, and two GPUs that are none.
set -euo pipefail
command=$1 folder=$2
export SLURM_CONF=$folder/slurm.conf

stop() { # the daemons write their own process ids
    for file in "$folder"/*.pid; do
        [[ -s $file ]] && kill "$(<"$file")" 2>/dev/null || true
    done
}
[[ $command == start ]] || { stop; exit 0; }

first=$(hostname) second=$(hostname)-b # only the first is ever looked up
mkdir -p "$folder"/{state,spool/"$first",spool/"$second"}
head -c 128 /dev/urandom > "$folder/key"
chmod 600 "$folder/key"

cat > "$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$first(127.0.0.1)
SlurmctldPort=$3
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
GresTypes=gpu
NodeName=$first NodeAddr=127.0.0.1 Port=$(($3 + 1)) CPUs=$(nproc) Gres=gpu:2
NodeName=$second NodeAddr=127.0.0.1 Port=$(($3 + 2)) CPUs=$(nproc) Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES State=UP
END
cat > "$folder/gres.conf" <<END
NodeName=$first,$second Name=gpu File=/dev/null
NodeName=$first,$second Name=gpu File=/dev/zero
END

# --force: munged mistrusts a socket in a private folder, where only root finds it, and nobody else needs to
munged --force --key-file="$folder/key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
    --log-file="$folder/munge.log" --seed-file="$folder/seed" 2>> "$folder/munge.log"
slurmctld
slurmd -N "$first"
slurmd -N "$second"
for _ in {1..100}; do
    [[ $(sinfo --noheader --format=%T%D) == idle2 ]] && exit 0
    sleep 0.2
done
tail -n 20 "$folder"/*.log >&2
stop
exit 1
