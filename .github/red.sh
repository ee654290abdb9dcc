#!/usr/bin/env bash
# Opens one issue for a red night of a scale, or adds to the one that is open.
#   red.sh SCALE            (needs gh, GH_TOKEN, and GITHUB_* as GitHub sets them)
set -euo pipefail
scale=$1
title="Nightly is red at $scale"
summary=$(ls -d results/nightly/*-"$scale" 2>/dev/null | sort | tail -1)/summary.md
body=$(mktemp)
{
  echo "$GITHUB_SERVER_URL/$GITHUB_REPOSITORY/actions/runs/$GITHUB_RUN_ID at $GITHUB_SHA"
  echo
  if [ -f "$summary" ]; then head -c 60000 "$summary"; else echo "The night ended before it wrote a summary."; fi
} > "$body"
open=$(gh issue list --state open --search "in:title \"$title\"" --json number --jq '.[0].number // empty')
if [ -n "$open" ]; then
  gh issue comment "$open" --body-file "$body"
else
  gh issue create --title "$title" --body-file "$body"
fi
