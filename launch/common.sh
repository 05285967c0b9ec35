# shellcheck shell=bash
# The launch scripts source this file: errors, help, quoting, dry runs, the code as an archive. Scripts for a laptop use only
# what bash 3.2 of macOS has.
dry_run=''

fail() {
  echo "error: $*" >&2
  exit 2
}

# The comment at the top of a script is its --help.
show_help() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"
}

# Fails if the option $1 has no value $2. Only the value of --create-flag may be a flag itself.
needs_value() {
  [ $# -gt 1 ] && [ -n "$2" ] || fail "$1 needs a value; see --help"
  [ "$1" = --create-flag ] || [ "${2#--}" = "$2" ] || fail "$1 needs a value, not $2; see --help"
}

# Reads the options of a script. The script defines `option NAME WORDS...`, which stores one option and sets takes=2 if the
# option has a value. The words after --, or from the first --config on, are arguments of the training: `train`.
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

# Checks the --name of a machine or run, which --help describes.
check_name() {
  [ -n "$1" ] || fail "--name is required; see --help"
  [[ $1 =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "--name $1: small letters, digits and -, a letter first"
}

check_train() {
  [ ${#train[@]} -gt 0 ] || fail "give the arguments of the training: -- --config configs/film.py --config.output=gs://BUCKET/..."
}

# Prints the number of chips of a topology such as 4x4.
chips_of() {
  echo $((${1//x/ * }))
}

# Adds --env NAME=VALUE to `environment`.
add_environment() {
  needs_value "$@"
  [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env $2 is not NAME=VALUE"
  environment+=("$2") takes=2
}

# Prints its arguments as one line of shell. Quotes only the words that need it.
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

# Runs a command or, in a dry run, prints it. The command gets no input: ssh would consume what the user types.
run() {
  if [ -n "$dry_run" ]; then quote "$@"; else "$@" < /dev/null; fi
}

# Writes the project to a gzipped tar: the files that git tracks or would track, with their present content.
pack_code() {
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    tar -czf "$1" --null -T -
}
