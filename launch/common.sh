# shellcheck shell=bash
# Sourced by the launch scripts: errors, help, quoting, dry runs, the code as an archive. The scripts that a laptop runs keep
# to what bash 3.2 of macOS knows.
dry_run=''

fail() {
  echo "error: $*" >&2
  exit 2
}

# The comment at the top of a script is its --help.
show_help() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"
}

# Of an option and what follows it. Only the value of --create-flag is a flag itself.
needs_value() {
  [ $# -gt 1 ] && [ -n "$2" ] || fail "$1 needs a value; see --help"
  [ "$1" = --create-flag ] || [ "${2#--}" = "$2" ] || fail "$1 needs a value, not $2; see --help"
}

# Reads the options of a script, which says by `option NAME WORDS...` what each one sets; takes=2 when the next word is its value.
# What stands after --, or begins with --config, is for the training: `train`.
# shellcheck disable=SC2034  # the scripts read it
parse_options() {
  train=()
  while [ $# -gt 0 ]; do
    case $1 in
      --) shift && train=("$@") && return ;;
      --config | --config=* | --config.*) train=("$@") && return ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    takes=1
    case $1 in
      --dry-run) dry_run=yes ;;
      *) option "$@" ;;
    esac
    shift "$takes"
  done
}

# --env NAME=VALUE, into `environment`.
add_environment() {
  needs_value "$@"
  [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env $2 is not NAME=VALUE"
  environment+=("$2") takes=2
}

# Its arguments as one line of shell that means just them; words are quoted only where they have to be.
quote() {
  local word line=''
  for word; do
    case $word in
      '') word="''" ;;
      *[!A-Za-z0-9_@%+=:,./-]*) word=$(printf '%s' "$word" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/'/") ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command or, in a dry run, prints it. Nothing here reads from the terminal: ssh would swallow what is typed ahead.
run() {
  if [ -n "$dry_run" ]; then quote "$@"; else "$@" < /dev/null; fi
}

# Writes the project to a gzipped tar: what git tracks and what it would track, as it is on the disk now.
pack_code() {
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    tar -czf "$1" --null -T -
}
