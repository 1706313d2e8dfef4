#!/bin/bash
# Runs one command on all hosts of a Cloud TPU VM, and starts it again until it is finished.
#
#   export TPU_NAME=slm ZONE=us-west4-a ACCELERATOR_TYPE=v5litepod-16 RUNTIME_VERSION=v2-alpha-tpuv5-lite
#   launch/tpu_vm.sh create            asks for the TPU as a queued resource, and waits for it
#   launch/tpu_vm.sh setup             installs the commit at hand on every host
#   launch/tpu_vm.sh run slm train --gin_file mine.gin
#   launch/tpu_vm.sh logs              fetches every host's log of the newest attempt
#   launch/tpu_vm.sh stacks            has every process write its stacks to its log
#   launch/tpu_vm.sh stop              has every process save and end; `run` ends with 75
#   launch/tpu_vm.sh delete            gives the TPU back
#
# `run` may be ended and typed again: processes go on without it, and it finds them. Ctrl-C and SIGTERM stop them.
# It makes a preempted TPU anew (create, setup). More settings, as variables:
#   PROJECT           gcloud's        project
#   SPOT              0               1: a spot TPU, which may be preempted
#   SETUP             see below       command that installs on a host, in place of the commit at hand
#   LOG_DIR           tpu-TPU_NAME    folder here: attempt-A/I.log, environment, state
#   PROGRESS_DIR      none            gs://.../MODEL_DIR/checkpoints: a newer checkpoint makes restarts count anew
#   MAX_RESTARTS      5               in a row, without a newer checkpoint
#   GRACE             120             seconds that the other processes have after one has failed
#   SAVE_LIMIT        600             seconds to save when asked to stop
#   UNREACHABLE       600             seconds that a host may not answer before all are started again
#   POLL              30              seconds between two looks at the hosts
set -uo pipefail

say() { printf 'launch: %s\n' "$*"; }
refuse() {
    say "error: $*" >&2
    exit 2
}

for name in TPU_NAME ZONE; do
    [[ -n ${!name:-} ]] || refuse "the variable $name is not set"
done
command -v gcloud >/dev/null || refuse "gcloud was not found"
log_dir=${LOG_DIR:-tpu-$TPU_NAME}
state=$log_dir/restarts
where=(--zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet)
mkdir -p "$log_dir" || refuse "LOG_DIR=$log_dir cannot be made"
asked=0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# What runs on a host. A command is told by ssh at most once: a second `start` of an attempt does nothing.
# shellcheck disable=SC2016  # expanded on the host
worker='
action=$1 folder=$HOME/slm-launch/$2
shift 2
case $action in
start)
    mkdir -p "$HOME/slm-launch"
    mkdir "$folder" 2>/dev/null || exit 0
    # What an earlier attempt left behind, or a launcher that could not reach this host, holds the TPU.
    for old in "$HOME"/slm-launch/*/session; do
        kill -KILL -- "-$(cat "$old")" 2>/dev/null
    done
    {
        date -Is
        uname -a
        env | grep -E "^(JAX|XLA|LIBTPU|TPU|SLM_|PYTHON|LD_|NPROC)" |
            sed -E "s/^([^=]*(TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH)[^=]*)=.*/\1=(not written)/"
        "$HOME/slm-venv/bin/python" -m pip --disable-pip-version-check freeze
    } >"$folder/environment" 2>&1
    PATH=$HOME/slm-venv/bin:$PATH setsid nohup bash -c '\''
        folder=$1
        shift
        "$@" &
        echo "$!" >"$folder/pid"
        wait "$!"
        echo "$?" >"$folder/status.part"
        mv "$folder/status.part" "$folder/status"
        '\'' slm-host "$folder" "$@" >"$folder/log" 2>&1 </dev/null &
    echo "$!" >"$folder/session"
    ;;
status)
    if [[ -e $folder/status ]]; then
        cat "$folder/status"
    elif kill -0 -- "-$(cat "$folder/session" 2>/dev/null || echo none)" 2>/dev/null; then
        echo running
    else
        # It was killed, or the host has booted anew.
        echo killed
    fi
    ;;
stacks) kill -USR1 "$(cat "$folder/pid")" 2>/dev/null ;;
stop) kill -TERM "$(cat "$folder/pid")" 2>/dev/null ;;
kill) kill -KILL -- "-$(cat "$folder/session")" 2>/dev/null ;;
*) cat "$folder/$action" ;;
esac
exit 0'

# In a session of its own, as Ctrl-C is this launcher's alone: what has all processes save must come through.
gcloud_alone() { setsid --wait gcloud "$@"; }

# on_all ACTION ATTEMPT [WORD ...]: each host's output goes to its own file, I.log in $output.
on_all() {
    output=$scratch/$1
    rm -rf "$output"
    mkdir -p "$output"
    gcloud_alone compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker=all --output-directory="$output" \
        --command="bash -c $(printf '%q ' "$worker" slm-worker "$@")" >"$scratch/gcloud" 2>&1
}

tpu_state() { gcloud_alone compute tpus tpu-vm describe "$TPU_NAME" "${where[@]}" --format='value(state)' 2>/dev/null; }
resource_state() {
    gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" --format='value(state.state)' 2>/dev/null
}

create() {
    local found last='' spot=()
    for name in ACCELERATOR_TYPE RUNTIME_VERSION; do
        [[ -n ${!name:-} ]] || refuse "the variable $name is not set"
    done
    if [[ ${SPOT:-0} == 1 ]]; then spot=(--spot); fi
    gcloud compute tpus queued-resources create "$TPU_NAME" "${where[@]}" --node-id="$TPU_NAME" \
        --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" "${spot[@]}" || return 1
    until asked_to_stop; do
        found=$(resource_state)
        [[ $found == "$last" ]] || say "the queued resource $TPU_NAME is $found"
        last=$found
        case $found in
        ACTIVE) return 0 ;;
        FAILED | SUSPENDED) return 1 ;;
        esac
        pause "${POLL:-30}"
    done
    return 1
}

delete() {
    gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force
}

setup() {
    # shellcheck disable=SC2016  # expanded on the host
    local command='set -e
        if [ ! -x slm-venv/bin/pip ]; then
            if python=$(command -v python3.12 || command -v python3.11); then
                "$python" -m venv slm-venv
            else
                python3 -m pip install --quiet --user uv
                python3 -m uv venv --quiet --seed --python 3.12 slm-venv
            fi
        fi
        mkdir -p slm-source && tar -xzf slm-source.tar.gz -C slm-source
        slm-venv/bin/pip install --quiet --constraint slm-source/requirements.lock "./slm-source[tpu,gcs]"'
    if [[ -z ${SETUP:-} ]]; then
        git archive --format=tar.gz --output="$scratch/slm-source.tar.gz" HEAD ||
            refuse "setup installs the commit at hand: go to the checkout, or say in SETUP what installs"
        gcloud compute tpus tpu-vm scp "$scratch/slm-source.tar.gz" "$TPU_NAME:" "${where[@]}" --worker=all ||
            return 1
    fi
    gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker=all --command="${SETUP:-$command}"
}

newest_attempt() {
    find "$log_dir" -maxdepth 1 -name 'attempt-*' -printf '%f\n' | sed 's/attempt-//' | sort -n | tail -n 1
}

newest_step() {
    # Orbax gives a folder its plain number when the checkpoint is whole.
    [[ -n ${PROGRESS_DIR:-} ]] && gcloud storage ls "$PROGRESS_DIR/" 2>/dev/null |
        sed -nE 's|.*/([0-9]+)/?$|\1|p' | sort -n | tail -n 1
}

# Counts a restart; fails where no more are allowed.
count_restart() {
    local best=-1 count=0 newest
    [[ -f $state ]] && read -r best count <"$state"
    newest=$(newest_step)
    if ((${newest:--1} > best)); then
        best=$newest count=0
    fi
    if ((count >= ${MAX_RESTARTS:-5})); then
        say "gave up: $count restarts brought no newer checkpoint"
        return 1
    fi
    restarts=$((count + 1))
    printf '%d %d\n' "$best" "$restarts" >"$state"
    say "restart $restarts of at most ${MAX_RESTARTS:-5} without a newer checkpoint; newest checkpoint: $best"
}

pause() {
    # In the background, as a trap runs only once the shell is free.
    sleep "$1" &
    wait $!
}

# "0:running 1:76 ", by host; fails where a host did not answer.
statuses() {
    local file
    on_all status "$1" || return 1
    for file in $(find "$output" -name '*.log' -printf '%f\n' | sort -n); do
        printf '%s:%s ' "${file%.log}" "$(tail -n 1 "$output/$file")"
    done
}

fetch_logs() {
    local file
    mkdir -p "$log_dir/$1"
    on_all log "$1" || return
    mv -f "$output"/*.log "$log_dir/$1/"
    on_all environment "$1" || return
    for file in "$output"/*.log; do
        mv -f "$file" "$log_dir/$1/environment-$(basename "$file" .log).txt"
    done
}

# Whether this launcher, or `stop` beside it, was asked to stop.
asked_to_stop() { ((asked)) || [[ -e $log_dir/stop ]]; }

# Looks at all hosts until their processes have ended, which it brings about where it has to. Leaves how in $found.
watch_attempt() {
    local stopping=0 deadline=0 answered=$SECONDS now
    found=''
    while true; do
        if now=$(statuses "$1"); then
            found=$now answered=$SECONDS
            [[ $found == *:running\ * ]] || return 0
        else
            now=$(tpu_state)
            [[ $now == READY ]] || {
                found="the TPU is ${now:-gone} "
                return 0
            }
            if ((SECONDS - answered > ${UNREACHABLE:-600})); then
                found="a host has not answered for ${UNREACHABLE:-600} s "
                on_all kill "$1"
                return 0
            fi
            say "a host does not answer: $(tail -n 1 "$scratch/gcloud")"
        fi
        if ((!stopping)) && asked_to_stop; then
            stopping=1 deadline=$((SECONDS + ${SAVE_LIMIT:-600}))
            on_all stop "$1"
        elif ((!deadline)) && [[ " $found" =~ :([1-9][0-9]*|killed)\  ]]; then
            deadline=$((SECONDS + ${GRACE:-120}))
            say "a process has failed: $found"
        elif ((deadline && SECONDS > deadline)); then
            on_all kill "$1"
        fi
        pause "${POLL:-30}"
    done
}

write_environment() {
    {
        printf 'command: %s\n' "$(printf '%q ' "$@")"
        printf 'time: %s\nfrom: %s\ngit commit: %s\n' "$(date -Is)" "$(hostname):$PWD" "$(git rev-parse HEAD 2>/dev/null)"
        git status --porcelain 2>/dev/null
        gcloud compute tpus tpu-vm describe "$TPU_NAME" "${where[@]}" \
            --format='yaml(acceleratorType,runtimeVersion,state,networkEndpoints[].ipAddress)' 2>/dev/null
    } >"$log_dir/$attempt/environment.txt"
}

# A TPU that is ready, made anew where it was taken away.
ready_tpu() {
    [[ $(tpu_state) == READY ]] && return 0
    say "the TPU $TPU_NAME is not ready; it is made anew"
    [[ -z $(resource_state) ]] || delete || return 1
    create && setup
}

# Whether an earlier launcher's attempt goes on; a host that does not answer is asked again.
still_running() {
    local end=$((SECONDS + ${UNREACHABLE:-600}))
    [[ $(tpu_state) == READY ]] || return 1
    until found=$(statuses "$1"); do
        say "a host does not answer: $(tail -n 1 "$scratch/gcloud")"
        if asked_to_stop || ((SECONDS > end)); then return 1; fi
        pause "${POLL:-30}"
    done
    [[ $found == *:running\ * ]]
}

run() {
    local began newest wait
    restarts=0
    trap 'asked=1' INT TERM HUP
    rm -f "$log_dir/stop"
    newest=$(newest_attempt)
    attempt=attempt-${newest:-0}
    if [[ -n $newest ]] && still_running "$attempt"; then
        say "$attempt is still running"
    else
        newest=$(newest_step)
        printf '%d 0\n' "${newest:--1}" >"$state"
        attempt=''
    fi
    while true; do
        began=$SECONDS found="it could not be started "
        if [[ -n $attempt ]]; then
            watch_attempt "$attempt"
        elif ready_tpu; then
            newest=$(newest_attempt)
            attempt=attempt-$((${newest:--1} + 1))
            mkdir -p "$log_dir/$attempt"
            write_environment "$@"
            say "$attempt on $TPU_NAME"
            on_all start "$attempt" "$@" || say "a host could not be reached: $(tail -n 1 "$scratch/gcloud")"
            watch_attempt "$attempt"
        fi
        [[ -z $attempt ]] || fetch_logs "$attempt"
        say "${attempt:-no attempt}: $found after $((SECONDS - began)) s; by host"
        [[ " $found" =~ ^(\ [0-9]+:0)+\ $ ]] && return 0
        [[ " $found" == *":2 "* ]] && return 2
        asked_to_stop && return 75
        count_restart || return 1
        wait=$((restarts < 7 ? 1 << (restarts - 1) : 60))
        pause $((wait / 2 + RANDOM % (wait / 2 + 1)))
        asked_to_stop && return 75
        attempt=''
    done
}

action=${1:-}
shift
case $action in
create)
    # What an earlier run was told does not end the waiting.
    rm -f "$log_dir/stop"
    create
    ;;
setup | delete) "$action" ;;
run)
    (($# > 0)) || refuse "a command is missing, such as: launch/tpu_vm.sh run slm train --gin_file mine.gin"
    run "$@"
    ;;
stop | stacks | logs)
    newest=$(newest_attempt)
    [[ -n $newest ]] || refuse "$log_dir holds no attempt"
    # So that `run` does not start it again.
    if [[ $action == stop ]]; then touch "$log_dir/stop"; fi
    if [[ $action == logs ]]; then fetch_logs "attempt-$newest"; else on_all "$action" "attempt-$newest"; fi
    status=$?
    if ((status)); then say "error: a host could not be reached: $(tail -n 1 "$scratch/gcloud")" >&2; fi
    exit "$status"
    ;;
*) refuse "'$action' is none of create, setup, run, stacks, stop, logs, delete" ;;
esac
